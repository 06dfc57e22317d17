"""Training losses: two for the enhancement itself, and what distillation adds to them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mvat.kernels import attention_transfer_loss
from mvat.kernels.attention_transfer_loss import FORMS, REDUCTIONS
from mvat.kernels.checks import check_choice, check_features, check_power
from mvat.models import Views

#: n_fft, hop and window length of the three STFTs, in samples at 16 kHz.
RESOLUTIONS = ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240))
#: Samples that the longest STFT needs to reflect its padding.
SHORTEST = max(n_fft for n_fft, _, _ in RESOLUTIONS) // 2 + 1
VIEW_NAMES = Views._fields
#: The spectral part's weight, of each resolution.
_HALF_MEAN = 0.5 / len(RESOLUTIONS)
#: The exponent of `compressed_spectral_loss`, and what keeps its derivative finite where a spectrum is zero.
_COMPRESSION, _FLOOR = 0.3, 1e-6


def _as_clips(op: str, **signals: Tensor) -> list[Tensor]:
    """Signals [B, T] or [B, 1, T] as [B, T], in float32 at least.

    ValueError unless all agree, there is a clip, and they are long enough to be reflected.
    """
    clips = []
    for name, signal in signals.items():
        is_flat = isinstance(signal, Tensor) and signal.dim() == 2
        check_features(op, name, signal, ("B", "T") if is_flat else ("B", "1", "T"))
        if not is_flat and signal.shape[1] != 1:
            raise ValueError(f"{op}: {name} must have shape [B, T] or [B, 1, T], got {list(signal.shape)}")
        clip = signal if is_flat else signal[:, 0]
        clips.append(clip.float() if clip.dtype in (torch.float16, torch.bfloat16) else clip)
    shapes = {name: list(signal.shape) for name, signal in signals.items()}
    if len({clip.shape for clip in clips}) > 1:
        raise ValueError(f"{op}: the signals must have one shape, got {shapes}")
    devices = {name: str(signal.device) for name, signal in signals.items()}
    if len(set(devices.values())) > 1:
        raise ValueError(f"{op}: the signals must be on one device, got {devices}")
    if clips[0].shape[0] < 1 or clips[0].shape[1] < SHORTEST:
        raise ValueError(f"{op}: the signals must be at least one clip of {SHORTEST} samples, got {shapes}")
    return clips


def _spectrum(x: Tensor, n_fft: int, hop: int, window_length: int) -> Tensor:
    """The STFT of x [B, T], periodic Hann window, centred, reflect padding: [B, F, frames]."""
    window = torch.hann_window(window_length, dtype=x.dtype, device=x.device)
    return torch.stft(x, n_fft, hop, window_length, window, center=True, pad_mode="reflect", return_complex=True)


def _spectral_distance(estimate: Tensor, target: Tensor) -> Tensor:
    """Spectral convergence and the mean difference of log magnitudes of two spectra [B, F, frames]: [B]."""
    x, y = ((s.real.square() + s.imag.square()).clamp(min=1e-7).sqrt() for s in (estimate, target))
    convergence = torch.linalg.vector_norm(y - x, dim=(1, 2)) / torch.linalg.vector_norm(y, dim=(1, 2))
    return convergence + (y.log() - x.log()).abs().mean((1, 2))


def mrstft_distance(estimate: Tensor, target: Tensor) -> Tensor:
    """Per-clip distance in time and in three resolutions of time and frequency.

        mean |x - y| + 0.5 mean over STFTs of ( ||Y - X||_F / ||Y||_F + mean |ln Y - ln X| )

    Args:
        estimate, target: audio [B, T] or [B, 1, T], at least 1025 samples.

    Returns:
        [B]. Zero, with a zero gradient, where both are equal.
    """
    x, y = _as_clips("mrstft_distance", estimate=estimate, target=target)
    distance = (x - y).abs().mean(1)
    for resolution in RESOLUTIONS:
        distance = distance + _HALF_MEAN * _spectral_distance(_spectrum(x, *resolution), _spectrum(y, *resolution))
    return distance


def weighted_mrstft_loss(estimate: Tensor, clean: Tensor, noisy: Tensor) -> Tensor:
    """The enhancement loss: the distance of speech and of residual noise, weighted by their energies in each clip.

        a D(estimate, clean) + (1 - a) D(noisy - estimate, noisy - clean),   D = `mrstft_distance`,
        a = |clean|^2 / (|clean|^2 + |noisy - clean|^2 + 2e-7),   then the mean over the batch

    The STFT is linear: the residuals' spectra are differences, and a gradient passes through one STFT a resolution.

    Args:
        estimate, clean, noisy: audio [B, T] or [B, 1, T], at least 1025 samples.

    Source: the weighted loss of MANNER (Park et al., ICASSP 2022) over Parallel WaveGAN's STFT loss.
    """
    estimate, clean, noisy = _as_clips("weighted_mrstft_loss", estimate=estimate, clean=clean, noisy=noisy)
    noise = noisy - clean
    speech_energy, noise_energy = clean.square().sum(1), noise.square().sum(1)
    a = speech_energy / (speech_energy + noise_energy + 2e-7)
    # In time both distances are the same: (noisy - estimate) - (noisy - clean) is clean - estimate.
    distance = (estimate - clean).abs().mean(1)
    for resolution in RESOLUTIONS:
        x, y, mixture = (_spectrum(signal, *resolution) for signal in (estimate, clean, noisy))
        speech, residual = _spectral_distance(x, y), _spectral_distance(mixture - x, mixture - y)
        distance = distance + _HALF_MEAN * (a * speech + (1 - a) * residual)
    return distance.mean()


def compressed_spectral_loss(estimate: Tensor, clean: Tensor, noisy: Tensor) -> Tensor:
    """An enhancement loss near to what PESQ hears: the distance of spectra whose magnitudes are compressed.

        0.9 mean (|X|^c - |Y|^c)^2 + 0.2 mean | |X|^c e^(i arg X) - |Y|^c e^(i arg Y) |^2 + 0.2 mean |x - y|,   c = 0.3

    x and y are estimate and clean over the root mean square of the clip's noisy signal, X and Y their STFTs of 512
    samples every 128, 1e-6 added to their squares. The exponent lets weak parts of speech count beside strong ones.

    Args:
        estimate, clean, noisy: audio [B, T] or [B, 1, T], at least 1025 samples.

    Source: Braun & Tashev, "A consolidated view of loss functions for supervised deep learning-based speech
    enhancement", TSP 2021; the weights are near those of MP-SENet (Lu et al., Interspeech 2023).
    """
    estimate, clean, noisy = _as_clips("compressed_spectral_loss", estimate=estimate, clean=clean, noisy=noisy)
    gain = (noisy.square().mean(1, keepdim=True) + 1e-8).rsqrt()
    x, y = estimate * gain, clean * gain
    spectra = [_spectrum(signal, 512, 128, 512) for signal in (x, y)]
    # The floor within the power, not beside it: |X|^c has no derivative at 0.
    power = [s.real.square() + s.imag.square() + _FLOOR for s in spectra]
    magnitude = [p.pow(_COMPRESSION / 2) for p in power]
    compressed = [s * p.pow((_COMPRESSION - 1) / 2) for s, p in zip(spectra, power, strict=True)]
    loudness = (magnitude[0] - magnitude[1]).square().mean()
    difference = compressed[0] - compressed[1]
    phase = (difference.real.square() + difference.imag.square()).mean()
    return 0.9 * loudness + 0.2 * phase + 0.2 * (x - y).abs().mean()


#: Loss functions of (estimate, clean, noisy) by the names that a configuration gives them.
ENHANCEMENT_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "weighted_mrstft": weighted_mrstft_loss,
    "compressed_spectral": compressed_spectral_loss,
}


class AttentionTransferLoss(nn.Module):
    """`mvat.kernels.attention_transfer_loss` as a module, for any two networks whose features agree in batch and time.

    It has no parameters. Called with two equally long sequences of tensors, the student's and the teacher's, each a
    feature [B, C, T] or a map [B, T], in any floating dtype; gives a float32 or float64 scalar, or one value a pair
    with reduction="none". Only the student gets a gradient. Every feature is read once: a pair costs one pass over both
    sides forward, one reading of the student's and one write backward.

    Args:
        p: the power in the map, finite and at least 1.
        form: "paper" or "code", see `attention_transfer_loss`.
        reduction: "sum" over the pairs, or "none".

    Raises:
        TypeError, ValueError: for a wrong power, or an unknown form or reduction.

    Examples:
        >>> student, teacher = torch.randn(2, 8, 100, requires_grad=True), torch.randn(2, 60, 100)
        >>> AttentionTransferLoss()([student], [teacher]).backward()

    Source: Zagoruyko & Komodakis, "Paying more attention to attention", ICLR 2017; Shin et al., "Multi-View Attention
    Transfer for Efficient Speech Enhancement", Interspeech 2022.
    """

    def __init__(self, p: float = 2.0, form: str = "paper", reduction: str = "sum") -> None:
        super().__init__()
        op = "AttentionTransferLoss"
        check_power(op, p)
        check_choice(op, "form", form, FORMS)
        check_choice(op, "reduction", reduction, REDUCTIONS)
        self.p, self.form, self.reduction = p, form, reduction

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        return attention_transfer_loss(student, teacher, p=self.p, form=self.form, reduction=self.reduction)

    def extra_repr(self) -> str:
        return f"p={self.p}, form={self.form!r}, reduction={self.reduction!r}"


def multi_view_transfer_loss(
    student: Sequence[Views],
    teacher: Sequence[Views],
    *,
    pairs: Sequence[tuple[int, int]] | None = None,
    views: Sequence[str] = VIEW_NAMES,
    p: float = 2.0,
    form: str = "paper",
) -> Tensor:
    """MV-AT: `mvat.kernels.attention_transfer_loss` summed over pairs of blocks and over views.

    Args:
        student, teacher: one Views per multi-view block in execution order, of features or of maps
            (`Manner(..., return_views=True)` and `return_maps=True`).
        pairs: (student block, teacher block) indices; None pairs all blocks in order.
        views: which of "channel", "global_", "local" are transferred.
        p, form: see `attention_transfer_loss`.

    Raises:
        ValueError: for pairs or views that do not exist.
    """
    check_views(views)
    chosen = block_pairs(len(student), len(teacher), pairs)
    return attention_transfer_loss(
        [getattr(student[s], view) for s, _ in chosen for view in views],
        [getattr(teacher[t], view) for _, t in chosen for view in views],
        p=p,
        form=form,
    )


def check_views(views: Sequence[str]) -> None:
    """ValueError unless `views` is a sequence of names of views, at least one."""
    if isinstance(views, str) or not isinstance(views, Sequence) or not views or set(views) - set(VIEW_NAMES):
        raise ValueError(f"views must be a sequence of some of {', '.join(VIEW_NAMES)}, got {views!r}")


def block_pairs(students: int, teachers: int, pairs: Sequence[tuple[int, int]] | None) -> list[tuple[int, int]]:
    """The pairs of block indices to transfer; ValueError if None and the numbers differ, or if one does not exist."""
    if pairs is None:
        if students != teachers:
            raise ValueError(
                f"the student has {students} multi-view blocks and the teacher {teachers}: "
                "name the pairs of blocks, such as pairs = [[0, 0], [1, 1]]"
            )
        return [(i, i) for i in range(students)]
    for pair in pairs:
        if isinstance(pair, str) or not isinstance(pair, Sequence) or [type(index) for index in pair] != [int, int]:
            raise ValueError(f"pairs must be of two indices, [student block, teacher block], got {pair!r}")
        s, t = pair
        if not (0 <= s < students and 0 <= t < teachers):
            raise ValueError(f"pair ({s}, {t}) does not exist: {students} student and {teachers} teacher blocks")
    return [(s, t) for s, t in pairs]


def block_transfer_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    pairs: Sequence[tuple[int, int]] | None = None,
    p: float = 2.0,
    form: str = "paper",
) -> Tensor:
    """Plain attention transfer, for comparison: the same loss on the blocks' outputs (or their maps)."""
    chosen = block_pairs(len(student), len(teacher), pairs)
    return attention_transfer_loss([student[s] for s, _ in chosen], [teacher[t] for _, t in chosen], p=p, form=form)


def output_distillation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Output distillation, for comparison (ours): the clips' mean `mrstft_distance` to the teacher's estimate."""
    return mrstft_distance(student, teacher.detach() if isinstance(teacher, Tensor) else teacher).mean()
