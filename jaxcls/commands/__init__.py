"""The commands of the command line: the arguments of each, and what it runs and prints.

A command is `name: (add_arguments, run, help)` in the COMMANDS of a module here; `run(args)` returns
the exit status.
"""

from jaxcls.commands import after, attack, audit, compress, explain, look, training, use

TRAIN_HELP = training.TRAIN_HELP
COMMANDS = (
    training.COMMANDS
    | look.COMMANDS
    | after.COMMANDS
    | use.COMMANDS
    | explain.COMMANDS
    | attack.COMMANDS
    | audit.COMMANDS
    | compress.COMMANDS
)
