"""Arrays, tensors and options that Python functions are called with."""

from tests.bad_inputs import Case


def value(given: str, run: str, words: str) -> Case:
    return Case(given, run, words, error=ValueError)


def kind(given: str, run: str, words: str) -> Case:
    return Case(given, run, words, error=TypeError)


ENHANCE = (
    kind("nothing", "mvat.enhance(None, same)", "audio must be an array, a tensor or a path|NoneType"),
    kind("a number", "mvat.enhance(3, same)", "audio must be an array, a tensor or a path|int"),
    kind("bytes", "mvat.enhance(b'in.wav', same)", "audio must be an array, a tensor or a path|bytes"),
    kind("numbers in a list", "mvat.enhance([0.1, 0.2], same)", "audio[0] must be an array, a tensor or a path|float"),
    kind(
        "16-bit integers",
        "mvat.enhance(np.zeros(800, np.int16), same)",
        "floating point in [-1, 1]|int16|audio / 32768",
    ),
    kind("integers in a tensor", "mvat.enhance(zeros(800, dtype=torch.int32), same)", "floating point|torch.int32"),
    kind("complex samples", "mvat.enhance(np.zeros(800, complex), same)", "floating point|complex128"),
    kind("texts in an array", "mvat.enhance(np.array(['a', 'b']), same)", "floating point|<U1"),
    kind("objects in an array", "mvat.enhance(np.array([None, 1]), same)", "floating point|object"),
    kind("true and false", "mvat.enhance(np.zeros(800, bool), same)", "floating point|bool"),
    value("no samples", "mvat.enhance(zeros(0), same)", "not empty, got shape [0]"),
    value("no channels", "mvat.enhance(zeros(0, 800), same)", "not empty, got shape [0, 800]"),
    value("a single number", "mvat.enhance(np.zeros(()), same)", "[T] or [channels, T]|[]"),
    value("a batch", "mvat.enhance(zeros(2, 1, 800), same)", "[T] or [channels, T]|[2, 1, 800]"),
    value(
        "samples taken for channels", "mvat.enhance(zeros(800, 2), same)", "[channels, T], got [800, 2]|transpose it"
    ),
    value("a NaN", "mvat.enhance(np.full(800, np.nan), same)", "audio holds NaN or infinity"),
    value(
        "an infinity in the second of two",
        "mvat.enhance([zeros(9), ones(9) / 0], same)",
        "audio[1] holds NaN or infinity",
    ),
    value("a rate of 0", "mvat.enhance(zeros(800), same, 0)", "sample_rate must be 1000 to 10000000, got 0"),
    value("a rate below 0", "mvat.enhance(zeros(800), same, -16000)", "sample_rate must be 1000 to 10000000|-16000"),
    value("a rate in kHz", "mvat.enhance(zeros(800), same, 16)", "sample_rate must be 1000 to 10000000, got 16"),
    value("an absurd rate", "mvat.enhance(zeros(800), same, 10**9)", "sample_rate must be 1000 to 10000000|1000000000"),
    kind("a rate of a fraction", "mvat.enhance(zeros(800), same, 44100.5)", "sample_rate must be an integer|44100.5"),
    kind("a rate as text", "mvat.enhance(zeros(800), same, '16000')", "sample_rate must be an integer|'16000'"),
    kind("a rate of True", "mvat.enhance(zeros(800), same, True)", "sample_rate must be an integer|True"),
    value("a rate beside a path", "mvat.enhance('in.wav', same, 16000)", "must not be given with a path|in.wav"),
    kind("a path as model", "mvat.enhance(zeros(800), 'model')", "model must be a module, got str|from_pretrained"),
    kind("a class as model", "mvat.enhance(zeros(800), mvat.Manner)", "model must be a module, got type"),
    value("a model in training", "mvat.enhance(zeros(800), nn.Identity())", "training mode|model.eval()"),
    value(
        "a model that shortens",
        "mvat.enhance(ones(800), nn.Conv1d(1, 1, 3).eval())",
        "must give [1, 1, 800]|[1, 1, 798]",
    ),
    value(
        "a model that gives a tuple",
        "mvat.enhance(ones(800), nn.MaxPool1d(1, return_indices=True).eval())",
        "it gave tuple",
    ),
    value(
        "a window of half a second",
        "mvat.enhance(zeros(800), same, window=0.5)",
        "window must be 1 to 86400 seconds|0.5",
    ),
    value("a window of NaN", "mvat.enhance(zeros(800), same, window=nan)", "window must be 1 to 86400 seconds|nan"),
    kind("a window as text", "mvat.enhance(zeros(800), same, window='long')", "window must be seconds, None or|'long'"),
    kind(
        "progress as text",
        "mvat.enhance(zeros(800), same, progress='yes')",
        "progress must be True, False or None|'yes'",
    ),
    kind(
        "an output for an array",
        "mvat.enhance(zeros(800), same, out='out.wav')",
        "out needs the path of one file|Tensor",
    ),
    kind(
        "an output for two files",
        "mvat.enhance(['in.wav', 'in.wav'], same, out='out.wav')",
        "out needs the path|several",
    ),
    kind("an output that is no path", "mvat.enhance('in.wav', same, out=3)", "out must be a path, got int"),
    value("the input as output", "mvat.enhance('in.wav', same, out='in.wav')", "out is the input, in.wav"),
    value(
        "an output in no folder", "mvat.enhance('in.wav', same, out='gone/out.wav')", "the folder gone does not exist"
    ),
    value(
        "an output of another format",
        "mvat.enhance('in.wav', same, out='out.mp3')",
        "out.mp3: can write .wav and .flac only",
    ),
    value("a file that is not there", "mvat.enhance('gone.wav', same)", "gone.wav: no such file"),
    value("a name with a null byte", "mvat.enhance('a\\0b.wav', same)", "no such file"),
    value("a folder", "mvat.enhance('data', same)", "data: is a folder, expected an audio file"),
)

AUDIO = (
    kind(
        "integers to write",
        "mvat.audio.write('out.wav', np.zeros(9, np.int16), 16000)",
        "out.wav: samples must be floating|int16",
    ),
    value(
        "no samples to write", "mvat.audio.write('out.wav', np.zeros(0), 16000)", "out.wav: samples must be [T] or|[0]"
    ),
    value(
        "a batch to write",
        "mvat.audio.write('out.wav', np.zeros((1, 1, 9)), 16000)",
        "out.wav: samples must be [T] or|[1, 1, 9]",
    ),
    value(
        "a NaN to write",
        "mvat.audio.write('out.wav', np.full(9, np.nan), 16000)",
        "out.wav: the samples to write hold NaN",
    ),
    value(
        "a NaN over a file",
        "mvat.audio.write('in.wav', np.full(9, np.nan), 16000)",
        "in.wav: the samples to write hold NaN",
    ),
    value(
        "a rate of 0",
        "mvat.audio.write('out.wav', np.zeros(9), 0)",
        "out.wav: the sample rate must be a positive integer, not 0",
    ),
    value(
        "a rate below 0",
        "mvat.audio.write('out.wav', np.zeros(9), -8000)",
        "out.wav: the sample rate must be a positive integer, not -8000",
    ),
    value(
        "a rate of a fraction",
        "mvat.audio.write('out.wav', np.zeros(9), 0.5)",
        "out.wav: the sample rate must be a positive integer, not 0.5",
    ),
    value(
        "an unknown sample format",
        "mvat.audio.write('out.wav', np.zeros(9), 16000, 'PCM_12')",
        "out.wav: WAV cannot hold PCM_12",
    ),
    value(
        "a format of another container",
        "mvat.audio.write('out.flac', np.zeros(9), 16000, 'FLOAT')",
        "out.flac: FLAC cannot hold FLOAT",
    ),
    value(
        "samples taken for channels",
        "mvat.audio.write('out.wav', np.zeros((9000, 2)), 16000)",
        "out.wav: cannot hold 9000 channels|[channels, T]",
    ),
    value(
        "a folder to write to", "mvat.audio.write('data', np.zeros(9), 16000)", "data: can write .wav and .flac only"
    ),
    value("a start beyond the end", "mvat.audio.read('in.wav', 5000)", "in.wav: frames 5000 to|the file has 4000"),
    value("a start below 0", "mvat.audio.read('in.wav', -1, 5)", "in.wav: frames -1 to 4|the file has 4000"),
    value(
        "more frames than there are", "mvat.audio.read('in.wav', 0, 4001)", "in.wav: frames 0 to 4001|the file has 4000"
    ),
    value("no frames", "mvat.audio.read('in.wav', 0, 0)", "in.wav: frames 0 to 0|the file has 4000"),
    value("a header of a text", "mvat.audio.info('precious.txt')", "precious.txt: no readable audio"),
    value(
        "a rate of 0 to resample from",
        "mvat.audio.resample(np.zeros(9), 0, 16000)",
        "rate_in must be a positive integer, not 0",
    ),
    value(
        "a rate below 0 to resample to",
        "mvat.audio.resample(np.zeros(9), 16000, -1)",
        "rate_out must be a positive integer, not -1",
    ),
)

MODELS = (
    value("no channels", "mvat.Manner(hidden=0)", "hidden must be a positive integer, got 0"),
    value("a depth below 0", "mvat.Manner(depth=-1)", "depth must be a positive integer, got -1"),
    value("a depth of True", "mvat.Manner(depth=True)", "depth must be a positive integer, got True"),
    value("a kernel of a fraction", "mvat.Manner(kernel_size=7.5)", "kernel_size must be a positive integer, got 7.5"),
    value(
        "a stride above the kernel",
        "mvat.Manner(kernel_size=4, stride=8)",
        "stride must be at most kernel_size = 4, got 8",
    ),
    value("an odd chunk", "mvat.Manner(segment_len=63)", "segment_len must be an even integer of at least 2, got 63"),
    value("unknown layers", "mvat.Manner(attention_layers='none')", '"all" or "deepest", got \'none\''),
    value("layers as a list", "mvat.Manner(attention_layers=['all'])", '"all" or "deepest", got [\'all\']'),
    value("too many levels", "mvat.Manner(hidden=60, depth=40)", "2 ** depth|at most 65536|depth = 40"),
    kind("audio in an array", "mvat.Manner(hidden=6, depth=1)(np.zeros((1, 1, 9)))", "x must be a tensor, got ndarray"),
    kind(
        "audio in integers",
        "mvat.Manner(hidden=6, depth=1)(zeros(1, 1, 9, dtype=torch.long))",
        "floating dtype, got torch.int64",
    ),
    value("audio without channels", "mvat.Manner(hidden=6, depth=1)(zeros(1, 9))", "[B, in_channels, T], got [1, 9]"),
    value("stereo", "mvat.Manner(hidden=6, depth=1)(zeros(1, 2, 9))", "[B, 1, T >= 1], got [1, 2, 9]"),
    value("audio of no length", "mvat.Manner(hidden=6, depth=1)(zeros(1, 1, 0))", "[B, 1, T >= 1], got [1, 1, 0]"),
    value(
        "two requests",
        "mvat.Manner(hidden=6, depth=1)(zeros(1, 1, 9), return_views=True, return_maps=True)",
        "only one of",
    ),
    value(
        "a scale for another batch",
        "mvat.Manner(hidden=6, depth=1)(zeros(1, 1, 9), scale=ones(2, 1, 1))",
        "scale must be a tensor [1, 1, 1]|[2, 1, 1]",
    ),
    value(
        "a scale as number", "mvat.Manner(hidden=6, depth=1)(zeros(1, 1, 9), scale=1.0)", "scale must be a tensor|float"
    ),
    value(
        "a power below 1",
        "mvat.Manner(hidden=6, depth=1)(zeros(1, 1, 99), return_maps=True, p=0)",
        "p must be finite and at least 1, got 0",
    ),
    value("an unknown preset", "mvat.Manner.from_preset('tiny')", "base, large, small|'tiny'"),
    kind("nothing to patch", "mvat.patch(None)", "patch: the model must be a module, got NoneType"),
    kind("a class to patch", "mvat.patch(mvat.Manner)", "patch: the model must be a module, got type"),
    value("another network to patch", "mvat.patch(nn.Linear(2, 2))", "nothing was taken|no part of a MANNER network"),
    kind("a text to report on", "mvat.patch_report('model')", "patch_report: the model must be a module, got str"),
    kind("a dictionary to release", "mvat.unpatch({})", "unpatch: the model must be a module, got dict"),
    value("an unknown back end", "mvat.use_backend('cuda')", "auto, fused, eager|'cuda'"),
    value("a back end as True", "mvat.use_backend(True)", "auto, fused, eager|True"),
)


def channel(
    x: str = "zeros(2, 4, 9)",
    w1: str = "zeros(2, 4)",
    b1: str = "zeros(2)",
    w2: str = "zeros(4, 2)",
    b2: str = "zeros(4)",
) -> str:
    return f"channel_attention({x}, {w1}, {b1}, {w2}, {b2})"


def whole(x: str = "zeros(1, 2, 9)", w: str = "zeros(8, 8)", w_o: str = "zeros(8, 8)", more: str = "1, 8") -> str:
    return f"global_attention({x}, {w}, zeros(8, 8), zeros(8, 8), {w_o}, {more})"


def local(
    x: str = "zeros(1, 2, 9)",
    w: str = "zeros(2, 1, 3)",
    norm1: str = "norm(2)",
    v: str = "zeros(1, 2, 3)",
    norm2: str = "norm(1)",
    more: str = "8",
) -> str:
    return f"local_attention({x}, {w}, {norm1}, {v}, {norm2}, {more})"


OPS = (
    kind("a list", "attention_map([1.0])", "attention_map: x must be a tensor, got list"),
    kind("an array", "attention_map(np.zeros((1, 2, 3)))", "attention_map: x must be a tensor, got ndarray"),
    kind("integers", "attention_map(zeros(1, 2, 3, dtype=torch.int64))", "floating dtype, got torch.int64"),
    kind(
        "complex numbers", "attention_map(zeros(1, 2, 3, dtype=torch.complex64))", "floating dtype, got torch.complex64"
    ),
    value("a map already", "attention_map(zeros(2, 3))", "[B, C, T], got [2, 3]"),
    value("an image", "attention_map(zeros(1, 2, 3, 4))", "[B, C, T], got [1, 2, 3, 4]"),
    value("a power of a half", "attention_map(zeros(1, 2, 3), 0.5)", "p must be finite and at least 1, got 0.5"),
    value("a power of NaN", "attention_map(zeros(1, 2, 3), nan)", "p must be finite and at least 1, got nan"),
    value("an infinite power", "attention_map(zeros(1, 2, 3), inf)", "p must be finite and at least 1, got inf"),
    kind("a power as text", "attention_map(zeros(1, 2, 3), '2')", "p must be a number, got str"),
    kind("a power of True", "attention_map(zeros(1, 2, 3), True)", "p must be a number, got bool"),
    kind("a power in a tensor", "attention_map(zeros(1, 2, 3), torch.tensor(2.0))", "p must be a number, got Tensor"),
    kind(
        "a tensor in place of a list",
        "attention_transfer_loss(zeros(2, 3), [zeros(2, 3)])",
        "student must be a sequence of tensors, got Tensor",
    ),
    kind(
        "nothing as teacher",
        "attention_transfer_loss([zeros(2, 3)], None)",
        "teacher must be a sequence of tensors, got NoneType",
    ),
    kind(
        "a generator",
        "attention_transfer_loss((x for x in [zeros(2, 3)]), [zeros(2, 3)])",
        "student must be a sequence of tensors, got generator",
    ),
    value("no pairs", "attention_transfer_loss([], [])", "equally long, not empty, got 0 and 0"),
    value(
        "two students, one teacher",
        "attention_transfer_loss([zeros(2, 3)] * 2, [zeros(2, 3)])",
        "equally long, not empty, got 2 and 1",
    ),
    kind(
        "an integer map",
        "attention_transfer_loss([zeros(2, 3, dtype=torch.int32)], [zeros(2, 3)])",
        "student[0] must have a floating dtype|int32",
    ),
    kind("numbers", "attention_transfer_loss([1.0], [2.0])", "student[0] must be a tensor, got float"),
    value("a vector", "attention_transfer_loss([zeros(3)], [zeros(3)])", "student[0] must have shape|[3]"),
    value(
        "other lengths",
        "attention_transfer_loss([zeros(2, 3)], [zeros(2, 4)])",
        "pair 0 must agree in batch and time|[2, 3]|[2, 4]",
    ),
    value(
        "other batches",
        "attention_transfer_loss([zeros(2, 5, 3)], [zeros(1, 5, 3)])",
        "pair 0 must agree in batch and time|[1, 5, 3]",
    ),
    value(
        "no time", "attention_transfer_loss([zeros(2, 0)], [zeros(2, 0)])", "pair 0 must have at least one time step"
    ),
    value(
        "another device", "attention_transfer_loss([zeros(2, 3)], [zeros(2, 3, device='meta')])", "one device|cpu|meta"
    ),
    value(
        "an unknown form",
        "attention_transfer_loss([zeros(2, 3)], [zeros(2, 3)], form='book')",
        "form must be one of paper, code, got 'book'",
    ),
    value(
        "an unknown reduction",
        "attention_transfer_loss([zeros(2, 3)], [zeros(2, 3)], reduction='mean')",
        "reduction must be one of sum, none, got 'mean'",
    ),
    value(
        "a reduction of nothing",
        "attention_transfer_loss([zeros(2, 3)], [zeros(2, 3)], reduction=None)",
        "reduction must be one of sum, none, got None",
    ),
    kind("an array to gate", channel("np.zeros((2, 4, 9))"), "channel_attention: x must be a tensor, got ndarray"),
    value("no time to gate", channel("zeros(2, 4, 0)"), "at least one channel and one sample|[2, 4, 0]"),
    value("another width", channel("zeros(2, 5, 9)"), "fc1_weight must have shape [2, 5], got [2, 4]"),
    value("a bias too long", channel(b1="zeros(3)"), "fc1_bias must have shape [2], got [3]"),
    kind("no bias", channel(b2="None"), "fc2_bias must be a tensor, got NoneType"),
    kind(
        "weights in float64",
        channel(w2="zeros(4, 2).double()"),
        "fc2_weight must have the input's dtype torch.float32, got torch.float64",
    ),
    value(
        "a weight elsewhere",
        channel(w1="zeros(2, 4, device='meta')"),
        "fc1_weight must be on the input's device cpu, got meta",
    ),
    value(
        "features in 2-D to attend to",
        whole("zeros(2, 9)"),
        "global_attention: x must have shape [B, n, T], got [2, 9]",
    ),
    value("an odd chunk", whole(more="1, 7"), "segment_len must be an even integer of at least 2, got 7"),
    value("a chunk of nothing", whole(more="1, 0"), "segment_len must be an even integer of at least 2, got 0"),
    value("a chunk of a fraction", whole(more="1, 8.0"), "segment_len must be an even integer of at least 2, got 8.0"),
    value("no heads", whole(more="0, 8"), "heads must be an integer of at least 1, got 0"),
    value("heads of True", whole(more="True, 8"), "heads must be an integer of at least 1, got True"),
    value("weights for one head", whole(more="2, 8"), "w_q must have shape [32, 8], got [8, 8]"),
    kind("a weight as list", whole(w="[1, 2]"), "w_q must be a tensor, got list"),
    kind(
        "an output weight in half",
        whole(w_o="zeros(8, 8).half()"),
        "w_o must have the input's dtype torch.float32, got torch.float16",
    ),
    value(
        "no channels to mask", local("zeros(1, 0, 9)"), "local_attention: x must have at least one channel|[1, 0, 9]"
    ),
    value("an even kernel", local(w="zeros(2, 1, 4)"), "depthwise_weight must have an odd kernel|[2, 1, 4]"),
    value("a kernel of nothing", local(v="zeros(1, 2, 0)"), "conv_weight must have an odd kernel|[1, 2, 0]"),
    value("a norm too wide", local(norm1="norm(3)"), "norm1.weight must have shape [2], got [3]"),
    kind("a module as norm", local(norm2="nn.BatchNorm1d(1)"), "norm2 must be a tuple|BatchNorm1d"),
    kind("a tuple of two as norm", local(norm2="(ones(1), zeros(1))"), "norm2 must be a tuple|running_mean"),
    value("a negative chunk", local(more="-8"), "segment_len must be an even integer of at least 2, got -8"),
)

LOSSES = (
    value(
        "clips too short",
        "weighted_mrstft_loss(zeros(1, 900), zeros(1, 900), zeros(1, 900))",
        "at least one clip of 1025 samples|[1, 900]",
    ),
    value("no clip", "weighted_mrstft_loss(*[zeros(0, 2000)] * 3)", "at least one clip of 1025 samples|[0, 2000]"),
    value(
        "lengths that differ",
        "weighted_mrstft_loss(zeros(1, 2000), zeros(1, 2001), zeros(1, 2000))",
        "one shape|[1, 2001]",
    ),
    value(
        "batches that would broadcast",
        "weighted_mrstft_loss(zeros(2, 2000), zeros(1, 2000), zeros(2, 2000))",
        "one shape|[1, 2000]",
    ),
    value(
        "stereo",
        "weighted_mrstft_loss(*[zeros(1, 2, 2000)] * 3)",
        "estimate must have shape [B, T] or [B, 1, T]|[1, 2, 2000]",
    ),
    value("a clip without batch", "weighted_mrstft_loss(*[zeros(2000)] * 3)", "estimate must have shape|[2000]"),
    kind("arrays", "weighted_mrstft_loss(*[np.zeros((1, 2000))] * 3)", "estimate must be a tensor, got ndarray"),
    kind(
        "integers",
        "mrstft_distance(zeros(1, 2000).long(), zeros(1, 2000))",
        "estimate must have a floating dtype|int64",
    ),
    kind("no target", "mrstft_distance(zeros(1, 2000), None)", "target must be a tensor, got NoneType"),
    value("devices that differ", "mrstft_distance(zeros(1, 2000), zeros(1, 2000, device='meta'))", "one device|meta"),
    kind(
        "no teacher's estimate",
        "output_distillation_loss(zeros(1, 2000), None)",
        "target must be a tensor, got NoneType",
    ),
    value("a power below 1", "AttentionTransferLoss(p=0.9)", "p must be finite and at least 1, got 0.9"),
    kind("a power of nothing", "AttentionTransferLoss(p=None)", "p must be a number, got NoneType"),
    value(
        "an unknown form", "AttentionTransferLoss(form='abstract')", "form must be one of paper, code, got 'abstract'"
    ),
    value(
        "a view that is none",
        "multi_view_transfer_loss([], [], views=['spectral'])",
        "some of channel, global_, local, got ['spectral']",
    ),
    value(
        "a view as text",
        "multi_view_transfer_loss([], [], views='local')",
        "some of channel, global_, local, got 'local'",
    ),
    value("no views", "multi_view_transfer_loss([], [], views=[])", "some of channel, global_, local, got []"),
    value(
        "views that are no list", "multi_view_transfer_loss([], [], views=3)", "some of channel, global_, local, got 3"
    ),
    value(
        "a pair that does not exist", "multi_view_transfer_loss([1], [1], pairs=[(0, 1)])", "pair (0, 1) does not exist"
    ),
    value("a pair of one", "multi_view_transfer_loss([1], [1], pairs=[(0,)])", "pairs must be of two indices|(0,)"),
    value(
        "blocks that do not pair",
        "block_transfer_loss([zeros(1, 2, 3)], [])",
        "the student has 1 multi-view blocks and the teacher 0",
    ),
    value(
        "a pair in words",
        "block_transfer_loss([zeros(1, 2, 3)], [zeros(1, 2, 3)], pairs='01')",
        "pairs must be of two indices|'0'",
    ),
)

GROUPS = {
    "`mvat.enhance`": ENHANCE,
    "`mvat.audio`": AUDIO,
    "Models": MODELS,
    "Operators": OPS,
    "Losses": LOSSES,
}
