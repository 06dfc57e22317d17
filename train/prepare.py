"""Prepare data: ``python -m train.prepare voicebank|voices|synthetic|dns --out DIR``.

Writes a folder with a manifest that training and evaluation read. Exit status 2 for what the user must mend.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mvat.errors import Parser, failed, interrupted, named
from train.dns import SKIPPED, Folders, find_folders, prepare_dns
from train.manifest import ManifestError, summary
from train.mixing import TRAIN_SNRS
from train.synthetic import prepare_synthetic
from train.voicebank import EXPECTED_SCORES, noisy_scores, prepare_voicebank
from train.voices import PACKAGE_SETS, SOURCES, SourceUnavailable, default_cache, prepare_voices

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    try:
        arguments = _parser().parse_args(argv)
        return arguments.run(arguments)
    except ManifestError as error:  # of many files, a line each
        title, *details = str(error).splitlines()
        return failed("train.prepare", title, details)
    except (ValueError, OSError, SourceUnavailable, ModuleNotFoundError) as error:
        return failed("train.prepare", error)
    except KeyboardInterrupt:
        return interrupted("train.prepare")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m train.prepare", description="Prepare data to train on.")
    kinds = parser.add_subparsers(required=True, metavar="voicebank|voices|synthetic|dns")

    voicebank = kinds.add_parser(
        "voicebank", allow_abbrev=False, help="VoiceBank-DEMAND, or one's own pairs in its folders"
    )
    voicebank.add_argument(
        "--source",
        type=Path,
        required=True,
        help="folder of {clean,noisy}_{trainset,testset}_wav; trainset_28spk or trainset_56spk will do too",
    )
    voicebank.add_argument("--no-score", action="store_true", help="do not score the noisy test files")
    voicebank.set_defaults(run=_voicebank)

    voices = kinds.add_parser(
        "voices",
        allow_abbrev=False,
        help="real voices and noises from Debian packages",
        description=f"Packages to choose from: {', '.join(SOURCES)}.",
    )
    voices.add_argument(
        "--packages",
        nargs="+",
        default=["demo"],
        metavar="NAME",
        help="demo (one voice a split, 43 MB; the default), full (many voices and noises, 670 MB), or package names",
    )
    voices.add_argument(
        "--train-snrs",
        type=float,
        nargs="+",
        default=list(TRAIN_SNRS),
        metavar="DB",
        help="signal-to-noise ratios of training and validation pairs in dB (%(default)s)",
    )
    voices.add_argument("--cache", type=Path, default=default_cache(), help="folder for downloads (%(default)s)")
    voices.set_defaults(run=_voices)

    synthetic = kinds.add_parser("synthetic", allow_abbrev=False, help="generated voices and noises")
    synthetic.set_defaults(run=_synthetic)

    dns = kinds.add_parser(
        "dns",
        allow_abbrev=False,
        help="speech and noise to mix in training: the DNS challenge's, or one's own",
        description="Name the challenge's repository, or folders of wav, flac or ogg files; these win over its own.",
    )
    dns.add_argument("--source", type=Path, metavar="DIR", help="the DNS challenge's repository or data folder")
    dns.add_argument("--clean", type=Path, nargs="+", metavar="DIR", help="clean speech")
    dns.add_argument("--noise", type=Path, nargs="+", metavar="DIR", help="noise")
    dns.add_argument("--rir", type=Path, nargs="+", metavar="DIR", help="room impulse responses")
    dns.add_argument("--test", type=Path, metavar="DIR", help="test pairs, a folder of clean/ and noisy/")
    dns.add_argument("--valid-minutes", type=float, default=10.0, help="validation pairs to mix (%(default)s)")
    dns.add_argument("--test-minutes", type=float, default=10.0, help="test pairs, without --test (%(default)s)")
    dns.add_argument("--seed", type=int, default=0, help="the same seed gives the same pairs (%(default)s)")
    dns.set_defaults(run=_dns)

    for kind in (voicebank, voices, synthetic, dns):
        kind.add_argument("--out", type=named, required=True, help="folder to write")
    for kind in (voices, synthetic):
        kind.add_argument("--train-minutes", type=float, default=12.0, help="training pairs (%(default)s)")
        kind.add_argument("--valid-minutes", type=float, default=1.0, help="validation pairs (%(default)s)")
        kind.add_argument("--test-minutes", type=float, default=2.0, help="test pairs (%(default)s)")
        kind.add_argument("--seed", type=int, default=0, help="the same seed gives the same files (%(default)s)")
    return parser


def _voicebank(arguments: argparse.Namespace) -> int:
    data = prepare_voicebank(arguments.source, arguments.out)
    print(summary(data))
    if not arguments.no_score:
        for metric, score in noisy_scores(data).items():
            found = "not scored" if score is None else f"{score:.3f}"
            print(f"  noisy test set {metric}: {found} (the real VoiceBank-DEMAND: {EXPECTED_SCORES[metric]})")
    return 0


def _voices(arguments: argparse.Namespace) -> int:
    packages = [package for name in arguments.packages for package in PACKAGE_SETS.get(name, (name,))]
    data = prepare_voices(
        arguments.out,
        packages=packages,
        cache=arguments.cache,
        train_snrs=arguments.train_snrs,
        **_amount(arguments),
    )
    print(summary(data))
    return 0


def _synthetic(arguments: argparse.Namespace) -> int:
    print(summary(prepare_synthetic(arguments.out, **_amount(arguments))))
    return 0


def _dns(arguments: argparse.Namespace) -> int:
    folders = Folders((), ()) if arguments.source is None else find_folders(arguments.source)
    given = {role: getattr(arguments, role) for role in Folders._fields if getattr(arguments, role)}
    folders = folders._replace(**given)
    if not folders.clean or not folders.noise:
        raise ValueError("dns needs --source, or --clean and --noise")
    amounts = {key: getattr(arguments, key) for key in ("valid_minutes", "test_minutes", "seed")}
    data = prepare_dns(folders, arguments.out, **amounts)
    print(summary(data))
    skipped = data.path.with_name(SKIPPED)
    lines = skipped.read_text(encoding="utf-8").splitlines()
    if lines:
        print(f"  {len(lines)} files left out, listed in {skipped}:", *lines[:10], sep="\n    ")
    return 0


def _amount(arguments: argparse.Namespace) -> dict[str, Any]:
    return {key: getattr(arguments, key) for key in ("train_minutes", "valid_minutes", "test_minutes", "seed")}


if __name__ == "__main__":
    sys.exit(main())
