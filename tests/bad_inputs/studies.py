"""Configurations and folders for `train.study`."""

from collections.abc import Callable
from pathlib import Path

from tests.bad_inputs import Case, all_of, nothing, written

STUDY = """\
out: study
teacher: {model: {arguments: {hidden: 6, depth: 1, segment_len: 8}}}
students: [{arguments: {hidden: 6, depth: 1, segment_len: 8}}]
methods: {none: {method: none}, at: {method: attention, weights: [0.1]}}
trials: {epochs: 1}
seeds: [0]
metrics: [si_sdr]
run:
  data: {path: data, segment_seconds: 0.25, stride_seconds: 0.25, workers: 0}
  optim: {epochs: 1, batch_size: 1}
  valid: {metrics: [si_sdr], select: si_sdr}
"""
RUN = "python -m train.study"
GOOD = written(STUDY, "study.yaml")


def option(given: str, options: str, words: str, make: Callable[[Path], object] = nothing) -> Case:
    """A good study with an option that is not."""
    return Case(given, f"{RUN} study.yaml {options}".rstrip(), words, all_of(GOOD, make))


def more(given: str, lines: str, words: str) -> Case:
    """A second file over the good study."""
    return option(given, "--config more.yaml", words, written(lines, "more.yaml"))


def methods(given: str, others: str, words: str) -> Case:
    """Other methods beside the student alone."""
    return more(given, f"methods: {{none: {{method: none}}, {others}}}\n", words)


STUDIES = (
    Case("no configuration", f"{RUN} --out study", "required|students, methods, trials.epochs"),
    Case("a text", f"{RUN} precious.txt", "precious.txt: not a configuration|str"),
    Case("the configuration of a run", f"{RUN} base.yaml", "base.yaml|model.arguments"),
    option("an unknown key", "--colour red", "colour"),
    option("a key that the study sets", "--run.seed 3", "run.seed"),
    option("no output", "--out ''", "out must be the name of a folder|''"),
    option("a file as output", "--out precious.txt", "precious.txt: is a file"),
    option("no students", "--students '[]'", "students: name at least one"),
    option("no methods", "--methods '{}'", "methods: exactly one must be {method: none}"),
    option("a seed below 0", "--seeds '[-1]'", "seeds must be one or more different numbers|[-1]"),
    option("a seed beyond 32 bits", "--seeds '[4294967296]'", "seeds must be|4294967295|[4294967296]"),
    option("trials of no epoch", "--trials.epochs 0", "trials.epochs must be at least 1|0"),
    option("an unknown metric", "--metrics '[mos]'", "metrics must be different ones of pesq_wb|mos"),
    option("a learning rate of 0", "--run.optim.lr 0", "run.optim.lr must be positive|0"),
    option("data that are not there", "--run.data.path gone", "gone: no such manifest"),
    option("no test set", "--run.data.path mixed", "mixed/manifest.json: the test set is empty"),
    more("a number as run", "run: 3\n", "more.yaml: run must be a section of keys and values|3"),
    more("nothing as teacher", "teacher:\n", "more.yaml: teacher must be a section of keys and values|nothing"),
    more("nothing as a number", "run: {optim: {batch_size: null}}\n", "run.optim.batch_size must be int|None"),
    option("a teacher that does not learn", "--teacher.epochs 0", "teacher.epochs must be at least 1|0"),
    more(
        "epochs for a teacher that is there",
        "teacher: {model: null, checkpoint: best.pt, epochs: 3}\n",
        "teacher.epochs: a teacher.checkpoint is not trained",
    ),
    more("two teachers", "teacher: {checkpoint: best.pt}\n", "name either teacher.model|teacher.checkpoint"),
    more("a teacher that is not there", "teacher: {model: null, checkpoint: gone.pt}\n", "gone.pt does not exist"),
    more("an unknown preset", "students: [{preset: huge}]\n", "students[0]: model.preset must be one of base|'huge'"),
    more("a student twice", "students: [{preset: base}, {preset: base}]\n", "students: every one must be another|base"),
    more("a number as methods", "methods: 3\n", "more.yaml|methods|3"),
    more(
        "no student alone",
        "methods: {at: {method: attention, weights: [0.1]}}\n",
        "methods: exactly one must be {method: none}",
    ),
    methods("an unknown method", "at: {method: magic, weights: [1]}", "more.yaml|methods|magic"),
    methods("a method's name of two words", "a b: {method: mvat, weights: [1]}", "methods: a name is made of|'a b'"),
    methods("a method without weights", "mv: {method: mvat}", "methods.mv.weights must be one or more|[]"),
    methods("a weight of 0", "at: {method: attention, weights: [0]}", "methods.at.weights must be|positive|[0.0]"),
    methods(
        "more weights for one method",
        "at: {method: attention, weights: [1]}, mv: {method: mvat, weights: [1, 2]}",
        "every method needs as many weights|at 1, mv 2",
    ),
    methods("a power below 1", "at: {method: attention, weights: [1], p: 0.5}", "methods.at, student|p must be|0.5"),
)

GROUPS = {"Studies": STUDIES}
