"""All scripts by one name: gradprobe COMMAND [arguments], or python -m gradprobe COMMAND [arguments].

    probe    sample rollouts, take gradients, write a dump     (probe_grad_vectors.py)
    check    is a dump sound?
    show     look at rollouts, tokens shaded by their entropy
    verify   judge a dump's rollouts anew
    merge    shards of one study become one dump               (merge_grad_vector_shards.py)
    exp1     how many directions each entropy bucket spans     (analyze_exp1_compression.py)
    exp2     do correct and incorrect rollouts push alike      (analyze_exp2_direction.py)
    exp3     which tokens carry the update, which its noise    (analyze_exp3_signal.py)
    plot     figures and the report                            (plot_exp12_intuitive.py)

gradprobe COMMAND --help explains each. A whole study is one command too: bash run_exp1_exp2.sh
"""

import importlib
import sys

MODULES = {
    "probe": "probe_grad_vectors",
    "check": "gradprobe.check",
    "show": "gradprobe.show",
    "verify": "gradprobe.verify",
    "merge": "merge_grad_vector_shards",
    "exp1": "analyze_exp1_compression",
    "exp2": "analyze_exp2_direction",
    "exp3": "analyze_exp3_signal",
    "plot": "plot_exp12_intuitive",
}


def main(argv: list[str] | None = None) -> int:
    """Hand the arguments on to a script's `main`; its exit status, or 2 where there is no such script."""
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__.strip())
        return 0
    if name not in MODULES:
        print(f"error: no command {name!a}; there are {', '.join(MODULES)}", file=sys.stderr)
        return 2
    sys.argv[0] = f"gradprobe {name}"  # what argparse calls the script
    return importlib.import_module(MODULES[name]).main(arguments)


if __name__ == "__main__":
    sys.exit(main())
