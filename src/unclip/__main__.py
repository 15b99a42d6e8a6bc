"""`python -m unclip`: the same as the command `unclip`."""

from unclip.cli.main import main

if __name__ == "__main__":
    main()
