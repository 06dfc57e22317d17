"""Command lines of `mvat` that cannot be understood."""

from tests.bad_inputs import Case

ENHANCE = "mvat enhance in.wav -o out.wav --checkpoint model"

GROUPS = {
    "Command lines": (
        Case("no command", "mvat --checkpoint model", "info|enhance|export|doctor"),
        Case("an unknown command", "mvat denoise in.wav", "denoise|enhance"),
        Case("a command cut short", "mvat enh in.wav -o out.wav", "enh|enhance"),
        Case("an unknown option", "mvat info --colour red", "--colour"),
        Case("an option cut short", f"{ENHANCE} --over", "--over"),
        Case("an unknown device", f"{ENHANCE} --device tpu", "--device|'tpu'|'cpu'"),
        Case("a window of half a second", f"{ENHANCE} --window 0.5", "--window|seconds, 1 at least|'0.5'"),
        Case("a window below 0", f"{ENHANCE} --window=-10", "--window|'-10'"),
        Case("a window of NaN", f"{ENHANCE} --window nan", "--window|'nan'"),
        Case("an infinite window", f"{ENHANCE} --window inf", "--window|'inf'"),
        Case("a window of two days", f"{ENHANCE} --window 172800", "window|172800"),
        Case("a window in words", f"{ENHANCE} --window long", "--window|'long'"),
        Case("an empty window", f"{ENHANCE} --window ''", "--window|''"),
        Case("an option without its value", f"{ENHANCE} --window", "--window|expected one argument"),
        Case("a value for a switch", f"{ENHANCE} --overwrite=yes", "--overwrite|'yes'"),
        Case("a model and a preset", f"{ENHANCE} --preset base", "--preset|not allowed with"),
        Case("an unknown preset", "mvat enhance in.wav -o out.wav --preset huge", "base, large, small|'huge'"),
        Case("an empty preset", "mvat enhance in.wav -o out.wav --preset ''", "base, large, small|''"),
        Case("information on an unknown preset", "mvat info --preset Base", "base, large, small|'Base'"),
        Case("information on no seconds", "mvat info --seconds 0", "--seconds|0.0001 and 1000000|'0'"),
        Case("information on seconds below 0", "mvat info --seconds=-4", "--seconds|'-4'"),
        Case("information on NaN seconds", "mvat info --seconds nan", "--seconds|'nan'"),
        Case("information on infinite seconds", "mvat info --seconds inf", "--seconds|'inf'"),
        Case("information on seconds in words", "mvat info --seconds four", "--seconds|'four'"),
        Case("information on a file", "mvat info in.wav", "in.wav"),
        Case("an option for the doctor", "mvat doctor --fix", "--fix"),
        Case("a word for the doctor", "mvat doctor please", "please"),
    )
}
