"""The commands of the command line: the arguments of each, and what it runs and prints.

A command is `name: (add_arguments, run, help)` in the COMMANDS of a module here; `run(args)` returns
the exit status.
"""

from jaxcls.commands import after, look, training

TRAIN_HELP = training.TRAIN_HELP
COMMANDS = training.COMMANDS | after.COMMANDS | look.COMMANDS
