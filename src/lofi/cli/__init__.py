"""The command line: one file a verb, each saying what it needs, asking the rooms for it, and showing what came back.

Knows  flags, output, exit codes. Knows not  how anything is computed.
"""
