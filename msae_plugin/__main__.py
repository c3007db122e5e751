"""`python -m msae_plugin` is `msae`."""

from msae_cli.app import main

if __name__ == "__main__":
    main()
