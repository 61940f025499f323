"""What is done with a finished run, one file a verb: `python -m glmtuner <verb> RUN …`.

A verb's module has `HELP`, one line; `arguments(parser)`, its options; and `run(given, words)`, which does it and returns
the exit code. `words` are the key=value words behind the run, such as generation.temperature=0.2.
"""

import pkgutil

VERBS = sorted(module.name for module in pkgutil.iter_modules(__path__))
