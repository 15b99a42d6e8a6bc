"""The command line: `unclip generate "a red apple"`. Heavy libraries are imported inside the commands."""
