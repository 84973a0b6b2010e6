"""Problems with answers that a rule can check: to train the bundled model on, and to measure accuracy with."""

from dilaserve.tasks.catalogue import DRY, HELD_OUT_SHARE, TASKS, Task, check, held_out, is_held_out, training
from dilaserve.tasks.problem import Problem

__all__ = ["DRY", "HELD_OUT_SHARE", "TASKS", "Problem", "Task", "check", "held_out", "is_held_out", "training"]
