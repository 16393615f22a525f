"""Workers on a Ray cluster: of this machine, or of several.

    with RayEngine(lambda: zoo.load("ioi-gpt2"), workers=2) as engine:
        effect = patch(model, task, engine=engine)

A worker is a process with a model of its own, which it loads by the recipe: one that has run cannot
be sent. Before it works it must show that its model is the driver's and its libraries are the same.
"""

from __future__ import annotations

import math
import os
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple
from weakref import finalize

import torch

from circuits.engines.local import Answers, Begin
from relp import ModelLike, TaskLike
from relp.bridge import Sites, fingerprint, observe, undisturbed, versions

__all__ = ["RayEngine"]

ATTEMPTS = 3
"""How many workers one item, or loading the model, may kill."""
SECONDS = 5.0
"""How long a cluster has to answer."""
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
"""Ray neither asks nor sends, and has no advice."""


class RayEngine:
    """Workers on a Ray cluster, each with a model of its own; what `engine=` takes.

    >>> from circuits.engines import RayEngine
    >>> engine = RayEngine(lambda: zoo.load("ioi-gpt2"), workers=4, cpus=2)
    >>> engine.workers
    4

    Ray is started when the engine is first used, on this machine; or connected to, where
    `ray.init()` has been called, or `address` or the variable RAY_ADDRESS names a cluster. Workers
    keep their model between calls. `close`, the end of a `with` block or of the process stops them,
    and Ray if it was started here. A worker that dies is replaced and does its piece again.

    Args:
        recipe: a function without arguments that gives the model; a function that workers can
            import, or a lambda. None for `bench`, whose cases load their own.
        workers: how many.
        cpus: cores of each.
        gpus: GPUs of each, or the share of one: with 0.5, two workers have one, half of its memory
            each. The recipe says that the model goes there.
        threads: of torch in each; as many as cores if None.
        address: of a cluster, `"host:port"`, or `"auto"` for one on this machine.

    Raises:
        TypeError: `recipe` is no function.
        ValueError: a number is too small.
    """

    def __init__(
        self,
        recipe: Callable[[], Any] | None = None,
        *,
        workers: int = 2,
        cpus: int | float = 1,
        gpus: int | float = 0,
        threads: int | None = None,
        address: str | None = None,
    ) -> None:
        if recipe is not None and not callable(recipe):
            raise TypeError(
                "`recipe` must be a function that loads the model in a worker; got a "
                f"{type(recipe).__name__}; write for instance lambda: zoo.load('ioi-gpt2')"
            )
        for name, value, least in (("workers", workers, 1), ("cpus", cpus, 0), ("gpus", gpus, 0)):
            if value < least:
                raise ValueError(f"`{name}` must be at least {least}; got {value}; give more")
        self.workers = workers
        self._recipe = recipe
        self._each = {"num_cpus": cpus, "num_gpus": gpus}
        self._threads = threads or max(1, int(cpus))
        self._address = address
        self._crew: list[Any] = []
        """The actors; shared with what stops them."""
        self._stop: finalize[..., Any] | None = None

    def __enter__(self) -> RayEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops the workers, and Ray if it was started for them; a later call starts them anew."""
        if self._stop is not None:
            self._stop()

    @contextmanager
    def working(
        self, begin: Begin, model: ModelLike | None = None, task: TaskLike | None = None
    ) -> Iterator[Answers]:
        """See `Engine`.

        Raises:
            ImportError: Ray is not installed.
            ConnectionError: the cluster cannot be reached.
            TypeError: there is no recipe, or something cannot be sent to a worker.
            ValueError: the cluster is too small for the workers, or one of them has another model
                or other libraries than this process.
            RuntimeError: the model cannot be loaded in a worker, or workers die again and again, of
                one item or as they load the model.
        """
        if model is not None and self._recipe is None:
            raise TypeError(
                "an engine must have a recipe to load the model in its workers; this one has none; "
                "write RayEngine(lambda: zoo.load('ioi-gpt2'))"
            )
        ray = _imported()
        recipe = self._recipe if model is not None else None
        work = zip(SENT, (recipe, begin, task), strict=True)
        sent = [_packed(ray, what, value) for what, value in work]
        here = _standing(model, task)
        self._connect(ray)
        # references, kept here for as long as workers may ask for what they stand for
        job = _Job(ray, self._hired, [ray.put(data) for data in sent], here, self._crew)
        job.gather(self.workers)
        try:
            yield job.answers
        finally:
            if ray.is_initialized():
                for actor in self._crew:
                    actor.rest.remote()

    def _connect(self, ray: Any) -> None:
        """Starts or finds the cluster, unless that is done, and looks whether there is room."""
        ours = not ray.is_initialized()
        if ours:
            self._crew.clear()
            address = self._address or os.environ.get("RAY_ADDRESS", "")
            _start(ray, address, math.ceil(self.workers * self._each["num_cpus"]))
        if ours or self._stop is None or not self._stop.alive:
            if self._stop is not None:
                self._stop.detach()
            self._stop = finalize(self, _stop, ray, self._crew, ours=ours)
        there = ray.cluster_resources()
        for kind, each in zip(("CPU", "GPU"), self._each.values(), strict=True):
            if each * self.workers > there.get(kind, 0) + 1e-6:
                raise ValueError(
                    f"the cluster must have {each * self.workers:g} {kind}s for {self.workers} "
                    f"workers of {each:g}; it has {there.get(kind, 0):g}; ask for less, or add "
                    "machines"
                )

    def _hired(self, ray: Any) -> Any:
        """A new worker."""
        share = self._each["num_gpus"] if self._each["num_gpus"] < 1 else 0
        kind = ray.remote(_Worker).options(scheduling_strategy="SPREAD", **self._each)
        return kind.remote(self._threads, share)


class _Worker:
    """What runs in a process of the cluster."""

    def __init__(self, threads: int, share: int | float) -> None:
        torch.set_num_threads(threads)
        if share and torch.cuda.is_available():
            torch.cuda.set_per_process_memory_fraction(share)
        self._model: Any = None
        self._answer: Callable[[list[Any]], Any] = list

    def begin(self, recipe: bytes, begin: bytes, task: bytes) -> dict[str, Any]:
        """Loads the model, if that is not done, and gets ready; says what it would work with."""
        import ray

        unpacked = ray.cloudpickle.loads
        try:
            if self._model is None and (load := unpacked(recipe)) is not None:
                self._model = load()
            pairs, start = unpacked(task), unpacked(begin)
            standing = _standing(self._model, pairs)
        except Exception as error:
            raise _unable(error) from error
        self._answer = start(self._model, pairs)
        return standing

    def answer(self, piece: bytes) -> Any:
        """Does a piece of the work."""
        import ray

        try:
            items = ray.cloudpickle.loads(piece)
        except Exception as error:
            raise _unable(error) from error
        return self._answer(items)

    def rest(self) -> None:
        """Lets go of what the work held, but for the model."""
        self._answer = list


def _unable(error: Exception) -> RuntimeError:
    return RuntimeError(
        "every worker must be able to load the model and what it works with; one cannot "
        f"({type(error).__name__}: {_line(error)}); install there what is installed here, and let "
        "`recipe` load what is there"
    )


class _Piece(NamedTuple):
    items: list[Any]
    deaths: int = 0
    """How many workers have died of it."""


class _Job:
    """One kind of work on one model and task, and who is at it."""

    def __init__(
        self,
        ray: Any,
        hired: Callable[[Any], Any],
        sent: list[Any],
        here: Mapping[str, Any],
        crew: list[Any],
    ) -> None:
        self._ray, self._hired, self._sent, self._here, self._crew = ray, hired, sent, here, crew
        self._coming: dict[Any, Any] = {}
        """Who gets ready, by what will come of it."""
        self._free: deque[Any] = deque()
        self._deaths = 0
        """Of workers, one after the other, that got ready."""

    def gather(self, workers: int) -> None:
        """Calls those who are there, and as many new ones as are missing."""
        for _ in range(workers - len(self._crew)):
            self._crew.append(self._hired(self._ray))
        for actor in self._crew:
            self._coming[actor.begin.remote(*self._sent)] = actor

    def answers(self, pieces: Iterable[list[Any]]) -> Iterator[tuple[list[Any], Any]]:
        """See `Answers`. What is under way when this is left is stopped."""
        queue = deque(map(_Piece, pieces))
        busy: dict[Any, tuple[Any, _Piece]] = {}
        try:
            while queue or busy:
                while queue and self._free:
                    actor, piece = self._free.popleft(), queue.popleft()
                    data = _packed(self._ray, f"the work on {piece.items[0]}", piece.items)
                    busy[actor.answer.remote(data)] = actor, piece
                (done, *_), _ = self._ray.wait([*busy, *self._coming])
                if done in self._coming:
                    self._begun(done)
                    continue
                actor, piece = busy.pop(done)
                try:
                    answer = self._got(done)
                except self._ray.exceptions.RayError as error:
                    self._replace(actor)
                    queue.extendleft(_halves(piece, error))
                    continue
                except BaseException:
                    self._free.append(actor)  # it has said why it could not
                    raise
                self._free.append(actor)
                yield piece.items, answer
        finally:
            for actor, _ in busy.values():
                self._dismiss(actor)

    def _begun(self, done: Any) -> None:
        """Takes in who is ready, if the model is the one that is here."""
        actor = self._coming.pop(done)
        try:
            _must_equal(self._got(done), self._here)
        except self._ray.exceptions.RayError as error:
            self._deaths += 1
            if self._deaths == ATTEMPTS:
                self._dismiss(actor)
                raise RuntimeError(
                    "workers must be able to load the model and the task; "
                    f"{ATTEMPTS} died over it, one after the other ({_line(error)}); give them "
                    "more memory, install there what is installed here, or ask for fewer"
                ) from error
            self._replace(actor)
        except BaseException:
            self._dismiss(actor)
            raise
        else:
            self._deaths = 0
            self._free.append(actor)

    def _got(self, done: Any) -> Any:
        """What a worker gives; what it raises, if it has."""
        try:
            return self._ray.get(done)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, Exception):
                raise error.cause from error
            raise RuntimeError(_line(error)) from error

    def _replace(self, actor: Any) -> None:
        self._dismiss(actor)
        new = self._hired(self._ray)
        self._crew.append(new)
        self._coming[new.begin.remote(*self._sent)] = new

    def _dismiss(self, actor: Any) -> None:
        """Stops a worker at once, whatever it does."""
        self._crew.remove(actor)
        self._ray.kill(actor)


def _halves(piece: _Piece, error: Exception) -> list[_Piece]:
    """What is to do again of a piece whose worker has died, so that who kills is found.

    Raises:
        RuntimeError: it is one item, and no worker survives it.
    """
    items, deaths = piece.items, piece.deaths + 1
    if len(items) > 1:
        half = len(items) // 2
        return [_Piece(items[half:]), _Piece(items[:half])]
    if deaths == ATTEMPTS:
        raise RuntimeError(
            f"a worker must survive its work; {deaths} died, one after the other, of {items[0]} "
            f"({_line(error)}); give workers more memory, or a smaller batch"
        ) from error
    return [_Piece(items, deaths)]


# -- the cluster -----------------------------------------------------------------------------------


def _imported() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ImportError(
            "a cluster must be reached with Ray, which is not installed; install it with "
            "pip install relp[cluster]"
        ) from error
    return ray


def _start(ray: Any, address: str, cpus: int) -> None:
    """Connects to a cluster, or starts one on this machine."""
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "CRITICAL"}
    if address in ("", "local"):
        address = "local"
        # workers are asked for by cores: more of them than there are take turns
        quiet |= {"num_cpus": max(cpus, os.cpu_count() or 1), "include_dashboard": False}
    else:
        _must_answer(address)
    before = {name: os.environ.get(name) for name in QUIET}
    os.environ.update({name: value for name, value in QUIET.items() if before[name] is None})
    try:
        ray.init(address=address, **quiet)
    # it leaves the process where a cluster does not answer
    except (Exception, SystemExit) as error:
        raise _unreachable(address, _line(error)) from error
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)


def _stop(ray: Any, crew: list[Any], *, ours: bool) -> None:
    """Stops the workers, and what was started for them."""
    if ray.is_initialized():  # or what is asked of it would start it again
        with suppress(Exception):
            for actor in crew:
                ray.kill(actor)
        if ours:
            ray.shutdown()
    crew.clear()


def _must_answer(address: str) -> None:
    """Refuses a cluster that is not there, for which Ray would wait for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdigit():  # `auto`, of which Ray knows at once
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=SECONDS).close()
    except OSError as error:
        raise _unreachable(address, _line(error)) from error


def _unreachable(address: str, why: str) -> ConnectionError:
    return ConnectionError(
        f"the Ray cluster at {address!r} must be reachable; it is not ({why}); start it with "
        "`ray start --head`, give its `address` or RAY_ADDRESS, or neither for one of this machine"
    )


# -- what is sent ----------------------------------------------------------------------------------

SENT = {
    "`recipe`": "let it load a model, not hold one",
    "the work": "give what it is made of as values",
    "the task": "write its metric as a function of a module, which holds no model",
}
"""What goes to every worker, and what to do where it cannot."""


def _packed(ray: Any, what: str, value: Any) -> bytes:
    """Something as bytes, lambdas and functions of a notebook included."""
    try:
        data: bytes = ray.cloudpickle.dumps(value)
    except Exception as error:
        raise TypeError(
            f"{what} must be sent to workers, and cannot be ({type(error).__name__}: "
            f"{_line(error)}); {SENT.get(what, 'leave out what only this process has')}"
        ) from error
    return data


def _line(error: BaseException) -> str:
    """What an error says first."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


# -- the model -------------------------------------------------------------------------------------


@undisturbed
def _standing(model: ModelLike | None, task: TaskLike | None) -> dict[str, Any]:
    """What must be the same here and in a worker."""
    found: dict[str, Any] = {"libraries": versions()}
    if model is not None:
        sites = Sites.of(model)
        found["precision"], found["weights"] = fingerprint(model)
        if task is not None:
            task.must_fit(sites.model.cfg, sites.model_name)
            sides = [observe(sites, task.select([0]), (), side=s)[1] for s in ("clean", "corrupt")]
            found["metrics"] = [float(metric) for metric in sides]
    return found


def _must_equal(there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuses a worker with another model, or whose model does not do what the one here does."""
    for what in ("libraries", "precision", "weights"):
        if there.get(what) != here.get(what):
            raise ValueError(
                "a worker must have the model and the libraries of this process; it has other "
                f"{what}, {there.get(what)!r}, here {here.get(what)!r}; let `recipe` load the same"
            )
    pairs = [*zip(there.get("metrics", ()), here.get("metrics", ()), strict=True)]
    eps = max((torch.finfo(getattr(torch, d)).eps for d in here.get("precision", "").split("+")
               if d), default=0.0)  # fmt: skip
    tolerance = max(1e-3, 8 * eps) * (1 + max((abs(b) for _, b in pairs), default=0.0))
    if any(abs(a - b) > tolerance for a, b in pairs):
        raise ValueError(
            "a worker's model must do what the one of this process does; on the first pair its "
            f"metrics are {there['metrics']}, here {here['metrics']}; let `recipe` set the hooks "
            "that the model has here"
        )
