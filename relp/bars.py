"""Progress bars: tqdm's own choice of one, made once and without its warning.

In a notebook without ipywidgets tqdm shows bars as text, which works, but whoever imports it first
is shown a red warning.
"""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from tqdm.auto import tqdm

__all__ = ["tqdm"]
