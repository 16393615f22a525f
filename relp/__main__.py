"""The command `relp`, and `python -m relp`.

It starts here because `relp` looks whether Python finds our own `circuits` before that is imported.
"""

from circuits.cli import app

if __name__ == "__main__":
    app(prog_name="relp")
