"""Speed beside other code, ``python -m benchmarks.<name>``; threads wait as they do under the commands."""

from structgrad.training.runtime import let_threads_sleep

let_threads_sleep()
