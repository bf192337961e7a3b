"""Settings that do not decide what a run computes."""

#: Top-level keys: where things are, who is told, what a sweep would try.
KEYS = ("paths", "logger", "run", "search")
#: Keys of ``trainer`` that say on which hardware, and how, the same computation is done.
HARDWARE = ("accelerator", "devices", "strategy", "compile", "log_every_n_steps")
