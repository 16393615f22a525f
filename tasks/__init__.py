"""Tasks: prompts whose answer hangs on one thing, and models small enough to ship."""

from tasks import zoo
from tasks.ioi import ioi
from tasks.metrics import KLDivergence, logit_difference, probability_difference
from tasks.task import Task

__all__ = ["KLDivergence", "Task", "ioi", "logit_difference", "probability_difference", "zoo"]
