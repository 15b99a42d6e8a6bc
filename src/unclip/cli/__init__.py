"""The command line: `unclip generate "a red apple"`.

Knows commands, files and people; knows not how anything is computed. Heavy libraries are imported inside the commands.
"""
