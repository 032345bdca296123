"""`flashmorph`, and the same as `python -m flashmorph`."""

from flashmorph.surface.interrupts import Interrupted, leave, listening


def main() -> None:
    """Run a command, with an ear for Ctrl-C from the first import on. Once interrupted, nothing is waited for."""
    try:
        with listening():
            from flashmorph.cli import main as command

            command()
    except Interrupted as stop:
        leave(stop.code)


if __name__ == "__main__":
    main()
