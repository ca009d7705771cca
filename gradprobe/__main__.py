"""What has no script of its own: gradprobe COMMAND [arguments], or python -m gradprobe COMMAND [arguments].

    check    is a dump sound?
    show     look at rollouts, tokens shaded by their entropy
    verify   judge a dump's rollouts anew

gradprobe COMMAND --help explains each. The six scripts do the rest; a whole study is one command: bash run_exp1_exp2.sh
"""

import importlib
import sys

COMMANDS = ("check", "show", "verify")


def main(argv: list[str] | None = None) -> int:
    """Hand the arguments on to a script's `main`; its exit status, or 2 where there is no such script."""
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__.strip())
        return 0
    if name not in COMMANDS:
        print(f"error: no command {name!a}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    sys.argv[0] = f"gradprobe {name}"  # what argparse calls the script
    return importlib.import_module(f"gradprobe.{name}").main(arguments)


if __name__ == "__main__":
    sys.exit(main())
