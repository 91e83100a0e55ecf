"""Train a model, or all in turn: `python -m coser.train autoencoder|denoiser|judge|all --preset small --run NAME ...`.

A run lives in `runs/<name>/`: `log.jsonl`, sample pictures, and `checkpoint-<step>/`, each a loadable pipeline folder
(for the autoencoder and the judge: a folder of their own, `vae` or `judge`) plus the training state. Starting the same
command again resumes from the last checkpoint and ends where an uninterrupted run would have ended, because every step
draws its randomness from (seed, step).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from coser import train_autoencoder, train_denoiser, train_judge, train_recipe
from coser.devices import add_dtype_option, choose_device, dtype_asked_for
from coser.train_loop import Budget, Options


def main(arguments: list[str] | None = None) -> None:
    try:
        options, loop = parse(arguments)
        options.run_verb(options, loop)
    except (ValueError, OSError) as error:
        sys.exit(f"coser: {error}")


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, Options]:
    """Command line => its options, resolved, and those of the training loop."""
    parser = argparse.ArgumentParser(prog="python -m coser.train", description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for module in (train_autoencoder, train_denoiser, train_judge):
        verb = verbs.add_parser(module.VERB, help=module.__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        add_common_options(verb, sorted(module.PRESETS))
        module.add_options(verb)
        verb.set_defaults(run_verb=module.run)
    verb = verbs.add_parser(train_recipe.VERB, help=train_recipe.__doc__.split("\n")[0],
                            formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    train_recipe.add_options(verb)
    verb.set_defaults(processor_time=False, run_verb=lambda options, loop: train_recipe.run(options, loop, parse))
    options = parser.parse_args(arguments)
    choose_device(options.device)
    options.dtype = str(dtype_asked_for(options)).removeprefix("torch.")
    if options.steps is None and options.minutes is None:
        parser.error("give --steps or --minutes: a run without an end has no learning-rate schedule")
    return options, Options(
        run=Path("runs") / options.run if options.run.parent == Path(".") else options.run,
        budget=Budget(options.steps, options.minutes, processor_time=options.processor_time),
        save_every=options.save_every, log_every=options.log_every, evaluate_every=options.evaluate_every,
        warmup=options.warmup, decay_from=options.decay_from, save_minutes=options.save_minutes)


def add_common_options(parser: argparse.ArgumentParser, presets: list[str]) -> None:
    parser.add_argument("--preset", default="small", choices=presets, help="sizes and rates")
    parser.add_argument("--renders", type=Path, required=True, help="folder written by coser.data.render")
    parser.add_argument("--held-out", type=Path, required=True, help="rendered rings that are never trained on")
    parser.add_argument("--run", type=Path, required=True, help="name below runs/, or a path")
    parser.add_argument("--steps", type=int, help="end after so many steps")
    parser.add_argument("--minutes", type=float, help="end after so many minutes of training")
    parser.add_argument("--processor-time", action="store_true", help="minutes of computing on a processor instead of "
                        "the clock's: for comparisons on a machine that also does other work")
    parser.add_argument("--lr", type=float, help="learning rate, else the preset's for the optimiser")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="train on the first so many rings only")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_dtype_option(parser)
    parser.add_argument("--data-on-device", action=argparse.BooleanOptionalAction, default=False,
                        help="keep the whole data set on the device")
    parser.add_argument("--muon", action=argparse.BooleanOptionalAction, default=True,
                        help="Muon for matrices instead of AdamW for all weights")
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--save-minutes", type=float, help="save and evaluate also after so many minutes")
    parser.add_argument("--evaluate-every", type=int, default=500)
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=100, help="steps of linear learning-rate warm-up")
    parser.add_argument("--decay-from", type=float, default=0.6, help="share of the run after which the rate falls")


if __name__ == "__main__":
    main()
