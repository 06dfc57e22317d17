"""The Debian packages that hold freely licensed voices and noises, and their download without root."""

import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "DEMO_PACKAGES",
    "FULL_PACKAGES",
    "PACKAGE_SETS",
    "SOURCES",
    "Noise",
    "Source",
    "SourceUnavailable",
    "Voice",
    "check_packages",
    "fetch",
    "unpack",
]


class SourceUnavailable(RuntimeError):
    """The packages cannot be had on this machine; the message names what failed."""


@dataclass(frozen=True)
class Noise:
    """Files of one recording, or of recordings so alike that they belong into one split.

    Attributes:
        name: Kind of noise.
        split: "train", "valid" or "test".
        files: Patterns of the files' paths.
        joined: The files are short sounds that follow one another in random order; else each is a noise by itself.
    """

    name: str
    split: str
    files: tuple[str, ...]
    joined: bool = False


@dataclass(frozen=True)
class Voice:
    """Recordings of one speaker.

    Attributes:
        speaker: Name in the manifest.
        split: "train", "valid" or "test".
        files: Patterns of the files' paths.
    """

    speaker: str
    split: str
    files: tuple[str, ...] = ("*.g722",)


@dataclass(frozen=True)
class Source:
    """One package.

    Attributes:
        licence: Of the files used, from the package's copyright file.
        credit: Who made them.
        voices: Recordings to use as speech; a package of voices must be there, one of noises may be missing.
        noises: Recordings to use as noise.
    """

    licence: str
    credit: str
    voices: tuple[Voice, ...] = ()
    noises: tuple[Noise, ...] = ()


# June Wallack's recordings have the lowest background noise beside Allison Smith's, hence the test set. The same
# artist, and the same kind of recording (fires, rains), is never in two splits. A voice must be clean and wide-band:
# about 35 dB and more between speech and background, energy above 4 kHz, no clipping. This leaves out
# fillets-ng-data-cs (28 dB), fillets-ng-data-nl (clipped), asterisk-prompt-es-co and -fr-armelle (8 kHz).
SOURCES = {
    "asterisk-core-sounds-en-g722": Source(
        "CC-BY-SA-3.0",
        "Allison Smith (theivrvoice.com); contributions by Digium, Inc.",
        (Voice("allison", "train"),),
    ),
    "asterisk-core-sounds-es-g722": Source(
        "CC-BY-SA-3.0",
        "Allison Smith (theivrvoice.com); contributions by Digium, Inc.",
        (Voice("allison", "train"),),
    ),
    "asterisk-core-sounds-fr-g722": Source(
        "CC-BY-SA-3.0",
        "June Wallack (junewallack.com); translated by Clod Patry, Kristopher Lalletti, June Wallack; contributions by "
        "Digium, Inc., Unlimitel, BGM Informatique",
        (Voice("june", "test"),),
    ),
    "asterisk-core-sounds-it-g722": Source(
        "CC-BY-3.0",
        "Carlo Flora (carloflora.com); translated by Silvia Petrin",
        (Voice("carlo", "valid"),),
    ),
    "asterisk-moh-opsound-g722": Source(
        "CC-BY-SA-3.0",
        "Paul Shuler (Macroform); Manolo Camp; Reno Project",
        noises=(
            Noise("music", "train", ("moh/macroform-*.g722",)),
            Noise("music", "valid", ("moh/manolo_camp-*.g722",)),
            Noise("music", "test", ("moh/reno_project-*.g722",)),
        ),
    ),
    "minetest-data": Source(
        "CC-BY-SA-3.0 (*.ogg, by the Debian copyright file); the mods' README files say CC0-1.0 for env_sounds and "
        "CC-BY-3.0 for fire",
        "Yuval (water), Halion (lava), Dynamicell and dobroide (fires), all of freesound.org; Perttu Ahola (celeron55) "
        "and the Minetest contributors",
        noises=(
            Noise("water", "train", ("env_sounds/sounds/env_sounds_water.*.ogg",)),
            Noise("lava", "valid", ("env_sounds/sounds/env_sounds_lava.*.ogg",)),
            Noise(
                "fire",
                "test",
                (
                    "fire/sounds/fire_fire.*.ogg",
                    "fire/sounds/fire_large.ogg",
                    "fire/sounds/fire_small.ogg",
                    "default/sounds/default_furnace_active.ogg",
                ),
            ),
        ),
    ),
    "ardentryst": Source(
        "CC-BY-SA-3.0 (Sounds/*, Music/*)",
        "Sounds: Kendra Pietruszewski, Amy Dunwoodie and freesound.org users named in the copyright file; music: "
        "Jordan Trudgett",
        noises=(
            Noise("rain", "train", ("Sounds/Rain_Loop.ogg",)),
            Noise("music", "train", ("Music/*.ogg",)),
            Noise("fire", "test", ("Sounds/fire_loop.ogg",)),
        ),
    ),
    "plee-the-bear-data": Source(
        "CC-BY-SA-3.0 (media files)",
        "Plee the Bear team: Julien Jorge, Sébastien Angibaud, Philip Bradbury and others",
        noises=(
            Noise("rain", "train", ("sound/weather/rain.ogg",)),
            Noise("earthquake", "valid", ("sound/effect/earthquake.ogg",)),
        ),
    ),
    "sonic-pi-samples": Source(
        "CC0-1.0 (vinyl_hiss, ambi_glass_hum, ambi_haunted_hum, loop_industrial); MIT (loop_3d_printer)",
        "veezay, kaligari, godspine, all of freesound.org; Samuel Aaron",
        noises=(
            Noise("hiss", "train", ("samples/vinyl_hiss.flac",)),
            Noise("hum", "train", ("samples/ambi_glass_hum.flac", "samples/ambi_haunted_hum.flac")),
            Noise("industry", "valid", ("samples/loop_industrial.flac",)),
            Noise("printer", "test", ("samples/loop_3d_printer.flac",)),
        ),
    ),
    "asterisk-core-sounds-ru-g722": Source("CC-BY-3.0", "Maxim Topal (ivrvoice.ru)", (Voice("ivrvoice", "train"),)),
    "festvox-ru": Source(
        "BSD-like (free use and distribution, with notice, marked changes and authors' names)",
        "Nickolay V. Shmyrev",
        (Voice("nsh", "train", ("wav/*.wav",)),),
    ),
    "gcin-voice": Source(
        "CC-BY-3.0 (5.ogg)", "ChionMeilin with the vocal source from Chu Lo", (Voice("chulo", "train", ("5.ogg",)),)
    ),
    "klettres-data": Source(
        "GPL-2+",
        "Anne-Marie Mahfouf and the KDE translation teams",
        tuple(
            Voice(f"letters-{language.lower()}", "train", (f"klettres/{language}/*/*.ogg",))
            for language in ("de", "fr", "nds", "nl", "pt_BR", "uk")
        ),
    ),
    "lincity-ng-data": Source(
        "GPL-2+ (or, for the sounds, CC-BY-SA-2.0)",
        "LinCity-NG team: Ingo Ruhnke, David Kamphausen, Wolfgang Becker, Matthias Braun and others",
        noises=(
            Noise("traffic", "train", ("sounds/Trafic*.wav", "sounds/DirtTrack*.wav"), joined=True),
            Noise("rails", "train", ("sounds/RailTrain*.wav",), joined=True),
            Noise("harbour", "train", ("sounds/Harbor*.wav",), joined=True),
            Noise("machines", "train", ("sounds/Industry*.wav", "sounds/PowerCoal*.wav"), joined=True),
            Noise("mine", "train", ("sounds/CoalMine*.wav", "sounds/OreMine*.wav"), joined=True),
            Noise("workshop", "train", ("sounds/Blacksmith*.wav", "sounds/Recycle*.wav"), joined=True),
            Noise("building", "train", ("sounds/Build*.wav", "sounds/MonumentConstruction*.wav"), joined=True),
            Noise("crowd", "train", ("sounds/SportsCroud*.wav", "sounds/Market*.wav"), joined=True),
            Noise("street", "train", ("sounds/Residential*.wav", "sounds/School*.wav"), joined=True),
            Noise("farm", "train", ("sounds/Farm*.wav", "sounds/OrganicFarm*.wav"), joined=True),
        ),
    ),
    "megaglest-data": Source(
        "CC-BY-SA-3.0",
        "The Glest Team (glest.org); the MegaGlest Team (megaglest.org)",
        noises=(
            Noise("rain", "train", tuple(f"{tiles}/sounds/rain.*" for tiles in ("autumn", "birch_forest", "desert2"))),
            Noise("wind", "train", ("winter/sounds/wind.ogg", "desert2/sounds/day.ogg")),
            Noise(
                "insects",
                "train",
                (
                    *(
                        f"{tiles}/sounds/night.ogg"
                        for tiles in ("birch_forest", "dark_forest", "fernland", "mediterran")
                    ),
                    "autumn/sounds/nightime.ogg",
                ),
            ),
            Noise(
                "birds",
                "train",
                (
                    *(f"{tiles}/sounds/day.ogg" for tiles in ("birch_forest", "dark_forest", "fernland", "spring")),
                    "autumn/sounds/sunny_day.ogg",
                    "mediterran/sounds/desertday.ogg",
                ),
            ),
        ),
    ),
    "gnome-shell-pomodoro-data": Source(
        "GPL-3+",
        "Kamil Prusko, Arun Mahapatra and the gnome-pomodoro contributors",
        noises=(
            Noise("birds", "train", ("sounds/birds.ogg",)),
            Noise("clock", "train", ("sounds/clock.ogg", "sounds/timer.ogg")),
        ),
    ),
    "bucklespring-data": Source(
        "GPL-2+", "Ico Doornekampt", noises=(Noise("keyboard", "train", ("buckle/wav/*.wav",), joined=True),)
    ),
}
"""Every package that may be used, with what is used of it. Nothing else is ever downloaded.

Some packages with voices and noises are kept for testing and so are not here: tuxpaint-stamps-default, kajongg,
ktuberling-data, torcs-data, flightgear-data-base, unknown-horizons, btanks-data, and distant_cars of redeclipse-data.
loop_3d_printer of sonic-pi-samples is in the test split for the same reason.
"""

DEMO_PACKAGES = (
    "asterisk-core-sounds-en-g722",
    "asterisk-core-sounds-fr-g722",
    "asterisk-core-sounds-it-g722",
    "asterisk-moh-opsound-g722",
    "minetest-data",
)
"""One voice a split, music, water and fire: 43 MB."""

FULL_PACKAGES = tuple(SOURCES)
"""Ten training voices and some twenty kinds of recorded noise: 670 MB."""

PACKAGE_SETS = {"demo": DEMO_PACKAGES, "full": FULL_PACKAGES}
"""What can be named in place of packages."""

_log = logging.getLogger(__name__)
_TIMEOUT = 900  # seconds for one call of apt-get


def check_packages(packages: Sequence[str]) -> None:
    """Refuse every package that is not in SOURCES.

    Raises:
        ValueError: Another name.
    """
    unknown = [name for name in packages if name not in SOURCES]
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: not among the sources of voices; they are {', '.join(SOURCES)}")


def fetch(packages: Sequence[str], cache: Path, progress: bool = True) -> dict[str, Path]:
    """Download packages that are not in the cache yet, as any user, without touching the system's package state.

    apt-get works with the system's sources and keys, and with lists and cache of its own under `cache`. A package of
    noises that this release of the system lacks is left out with a warning; the voices must be there.

    Args:
        packages: Names out of SOURCES.
        cache: Folder to keep the packages in.
        progress: Show a progress bar.

    Returns:
        The .deb file of each package, voices first.

    Raises:
        ValueError: A package that is not in SOURCES.
        SourceUnavailable: No apt-get, no network, no such package of voices, or the cache cannot be written.
    """
    from tqdm import tqdm

    check_packages(packages)
    cache = cache.resolve()
    # Voices first: without them nothing else is worth fetching.
    packages = sorted(packages, key=lambda name: (not SOURCES[name].voices, name))
    files = {name: _cached(cache, name) for name in packages}
    missing = [name for name, file in files.items() if file is None]
    if missing:
        if not shutil.which("apt-get"):
            raise SourceUnavailable("apt-get is not installed: packages with voices come from Debian or Ubuntu alone")
        try:
            for folder in ("lists/partial", "archives/partial"):
                (cache / "apt" / folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SourceUnavailable(f"the cache {cache} cannot be written ({error.strerror})") from error
        bar = tqdm(missing, desc="package lists", unit="package", disable=None if progress else True)
        # A source list of the system's that fails does not matter as long as the packages come.
        update = _apt(cache, "update", cwd=cache)
        for name in bar:
            bar.set_description(name)
            with tempfile.TemporaryDirectory(dir=cache) as folder:
                download = _apt(cache, "download", name, cwd=Path(folder))
                found = next(Path(folder).glob(f"{name}_*.deb"), None)
                if download.returncode or found is None:
                    lines = (download.stderr + update.stderr).splitlines()
                    reason = "; ".join([line for line in lines if line.startswith("E:") or "Failed" in line][:2])
                    message = f"package {name} cannot be downloaded ({reason or 'apt-get failed'})"
                    if SOURCES[name].voices:
                        raise SourceUnavailable(message)
                    _log.warning("%s; left out", message)
                    continue
                os.replace(found, cache / found.name)
            files[name] = cache / found.name
    return {name: file for name, file in files.items() if file}


def unpack(package: Path, folder: Path) -> str:
    """Extract a .deb file into a folder; returns the package's version.

    Raises:
        SourceUnavailable: No dpkg-deb, or the file is damaged; it is removed then, so that the next call fetches it.
    """
    if not shutil.which("dpkg-deb"):
        raise SourceUnavailable("dpkg-deb is not installed: it unpacks Debian packages")
    try:
        subprocess.run(["dpkg-deb", "-x", str(package), str(folder)], check=True, capture_output=True, text=True)
        field = ["dpkg-deb", "-f", str(package), "Version"]
        return subprocess.run(field, check=True, capture_output=True, text=True).stdout.strip()
    except subprocess.CalledProcessError as error:
        package.unlink()
        raise SourceUnavailable(f"{package}: cannot be unpacked ({error.stderr.strip()}), removed") from error


def _cached(cache: Path, package: str) -> Path | None:
    """The newest file of a package in the cache."""
    return max(cache.glob(f"{package}_*.deb"), key=lambda file: file.stat().st_mtime, default=None)


def _apt(cache: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    options = {
        "Dir::State": cache / "apt",
        "Dir::State::Lists": cache / "apt" / "lists",
        "Dir::Cache": cache / "apt",
        "Dir::Cache::Archives": cache / "apt" / "archives",
        "Acquire::Languages": "none",
        "Acquire::Retries": 1,
        "Acquire::http::Timeout": 20,
        "Acquire::https::Timeout": 20,
    }
    command: list[str] = ["apt-get", "-qq", *(f"--option={key}={value}" for key, value in options.items()), *arguments]
    environment = os.environ | {"LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    try:
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=_TIMEOUT)
    except subprocess.TimeoutExpired as error:
        raise SourceUnavailable(f"apt-get {' '.join(arguments)} took more than {_TIMEOUT} s") from error
