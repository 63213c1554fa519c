"""`python -m frem_search`: the command, wherever its script lies."""

from frem_search.cli import main

if __name__ == "__main__":
    main()
