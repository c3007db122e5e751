"""`python -m msae_plugin` is `msae`."""

from msae_plugin.cli import main

if __name__ == "__main__":
    main()
