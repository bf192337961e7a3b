"""The public facts of a run: its exit codes, and which settings do not decide its result.

Sweeps and reports start runs and read their results. They import this module and no run, and it
needs nothing but Python itself.
"""

from typing import Any

#: Exit codes of the commands: 0 finished, 1 an error, and two that mean that the same command continues.
EXIT_ERROR = 1
EXIT_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: preempted, or another process has the run
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count: Ctrl-C

#: Budgets that every task has: the paper's protocol, minutes on two cores, seconds.
BUDGETS = ("paper", "quick", "smoke")

#: Groups whose choices identify a run in summaries and on dashboards.
CHOICES = ("task", "structure", "estimator", "budget", "data", "experiment")

#: Top-level keys that do not decide a result: folders, loggers, the search space of a sweep.
IRRELEVANT = ("paths", "logger", "run", "search")
#: Keys of ``trainer`` for hardware, the way to compute, and a pause. The computation is the same.
HARDWARE = ("accelerator", "devices", "strategy", "compile", "log_every_n_steps", "pause_at")

#: Options that were added after results had been stored -> the value at which they change nothing.
#: At that value they are no part of a run's identity and settings. So the stored results still
#: belong to the same commands.
NEUTRAL: dict[str, Any] = {
    "trainer.matmul_precision": "highest",
    "trainer.patience": None,
    "trainer.accumulate_grad_batches": 1,
    "task.schedule": None,
    "task.centre_inputs": False,
    "task.objective": "ours",
    "task.coefficients": None,
    "task.prior": "uniform",
    "task.eval_samples": 1,
    "task.data.files": None,
    "task.data.columns": None,
    "task.data.colour": "refused",
    "structure.single_root": False,
    "estimator.clip": "scores",
    "estimator.context_size": None,
    "estimator.start": "argmax",
    "estimator.epsilon": 0.01,
    "estimator.step": "direction",
}
