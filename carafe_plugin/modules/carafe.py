"""CARAFE++ up- and downsampling, and the kernel prediction that they share (paper, Sec. 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial

from torch import Tensor, nn

from ..ops._tracing import refuse_scripting
from ..ops.functional import scale_ratio
from ..ops.fused import reassemble_logits
from ..ops.reference import NORMALIZERS, masks_from_logits
from .checks import check_features, odd, positive
from .starts import KeepsItsStart, interpolating_, near_zero_, starting, xavier_


class KernelPrediction(KeepsItsStart):
    """Channel compressor, content encoder, kernel normaliser, and the reassembly with the kernels they predict.

    :class:`CARAFEUpsample` and :class:`CARAFEDownsample` are this module with names and defaults of their own; their
    docstrings describe the arguments.
    """

    downsamples = False
    starts: tuple[str, ...] = ("average", "nearest", "bilinear")
    __prepare_scriptable__ = staticmethod(refuse_scripting)

    def __init__(
        self,
        channels: int,
        scale_factor: int | float | Fraction,
        kernel_size: int,
        group_size: int,
        encoder_kernel: int,
        encoder_dilation: int,
        compressed_channels: int | None,
        normalizer: str,
        norm: Callable[[int], nn.Module] | None,
        act: Callable[[], nn.Module] | None,
        init: str,
        init_spread: float,
    ) -> None:
        super().__init__()
        self.channels = positive("channels", channels)
        self.scale_factor = scale_factor
        up, down = scale_ratio(scale_factor)
        if up < down:
            raise ValueError(f"scale_factor must be at least 1, got {scale_factor}")
        if self.downsamples:
            up, down = down, up
        self.up, self.down = up, down
        direction = "down" if self.downsamples else "up"
        self.kernel_size = odd(f"{direction}_kernel", kernel_size)
        self.group_size = positive(f"{direction}_group", group_size)
        self.encoder_kernel = odd("encoder_kernel", encoder_kernel)
        self.encoder_dilation = positive("encoder_dilation", encoder_dilation)
        self.compressed_channels = compressed_channels
        self.normalizer = normalizer
        self.init, self.init_spread = init, init_spread
        if compressed_channels is not None:
            positive("compressed_channels", compressed_channels)
        if channels % group_size:
            raise ValueError(f"channels must be a multiple of {direction}_group={group_size}, got {channels}")
        if normalizer not in NORMALIZERS:
            raise ValueError(f"normalizer must be one of {', '.join(NORMALIZERS)}, got {normalizer!r}")
        if compressed_channels is None and (norm is not None or act is not None):
            raise ValueError("norm and act follow the channel compressor: compressed_channels=None admits neither")
        if init not in self.starts:
            raise ValueError(f"init must be one of {', '.join(self.starts)}, got {init!r}")
        if init in ("bilinear", "average2", "average3") and kernel_size == 1:
            raise ValueError(f"{direction}_kernel must be at least 3 for init={init!r}, got 1")
        if isinstance(init_spread, bool) or not isinstance(init_spread, (int, float)) or not 1e-6 <= init_spread <= 1:
            raise ValueError(f"init_spread must be a number from 1e-06 to 1, got {init_spread!r}")

        self.channel_compressor = None
        if compressed_channels is not None:
            self.channel_compressor = starting(nn.Conv2d(channels, compressed_channels, 1), xavier_)
        # In the order in which they run: tools that fold norms into convolutions take a norm for its predecessor's.
        self.compressor_norm = None if norm is None or compressed_channels is None else norm(compressed_channels)
        self.compressor_act = None if act is None else act()
        content_encoder = nn.Conv2d(
            channels if compressed_channels is None else compressed_channels,
            group_size * kernel_size**2 * up**2,
            encoder_kernel,
            # With an odd kernel, this padding and a stride of s give ceil(H / s): the operator's output size.
            stride=down if up == 1 else 1,
            padding=(encoder_kernel - 1) * encoder_dilation // 2,
            dilation=encoder_dilation,
        )
        start: Callable[[nn.Conv2d], None] = near_zero_
        if init != "average":
            start = partial(interpolating_, init=init, spread=init_spread, settings=self.settings)
        self.content_encoder = starting(content_encoder, start)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A Xavier-uniform compressor, and a content encoder whose kernels are what ``init`` says."""
        self.init_weights()

    @property
    def settings(self) -> tuple[int, int, int, int, str]:
        """k, G, up, down and the normaliser: what :func:`carafe_plugin.ops.fused.reassemble_logits` takes last."""
        return self.kernel_size, self.group_size, self.up, self.down, self.normalizer

    def predict_logits(self, features: Tensor) -> Tensor:
        """What the content encoder says: (N, G * k^2 * up^2, H, W), or, downsampling, (N, G * k^2, H', W')."""
        for layer in (self.channel_compressor, self.compressor_norm, self.compressor_act, self.content_encoder):
            if layer is not None:
                features = layer(features)
        return features

    def predict_kernels(self, features: Tensor) -> Tensor:
        """The normalised kernels of every output location, (N, C, H, W) -> (N, G * k^2, H', W')."""
        return masks_from_logits(self.predict_logits(features), *self.settings)

    def forward(self, features: Tensor, output_size: int | Sequence[int] | None = None) -> Tensor:
        """Rescale features, (N, C, H, W) -> (N, C, ceil(H * up / down), ceil(W * up / down)).

        Args:
            features (Tensor[N, C, H, W]): as for :func:`carafe_plugin.ops.carafe`.
            output_size (int | Sequence[int] | None): (H', W'), or one number for both, to compute the first rows and
                columns of the output alone, ``output[..., :H', :W']``: the size of a map that was downsampled by
                rounding up. None means all.

        Raises:
            TypeError: ``output_size`` is neither an int nor two of them.
            ValueError: ``features`` have other channels, or there are no kernels for an ``output_size``: it is less
                than 1 or more than the whole output.
        """
        check_features(features, self.channels)
        return reassemble_logits(features, self.predict_logits(features), *self.settings, output_size)

    def extra_repr(self) -> str:
        settings = f"kernel_size={self.kernel_size}, group_size={self.group_size}, normalizer={self.normalizer!r}"
        return f"channels={self.channels}, scale={Fraction(self.up, self.down)}, {settings}"


class CARAFEUpsample(KernelPrediction):
    """Content-aware upsampling: (N, C, H, W) -> (N, C, ceil(sigma * H), ceil(sigma * W)).

    Paper, Sec. 3 and Fig. 3; the ICCV 2019 paper's CARAFE is this module. Argument names, parameter names and shapes,
    channel order and initialisation are those of mmcv's ``CARAFEPack``, so its checkpoints load with ``strict=True``.

    Args:
        channels (int): C, kept by the operator.
        scale_factor (int | float | fractions.Fraction): sigma, how many times larger the output is; at least 1.
        up_kernel (int): k of the reassembly, odd.
        up_group (int): G, groups of channels with kernels of their own; divides ``channels``.
        encoder_kernel (int): k_encoder, odd. The paper recommends ``up_kernel - 2``.
        encoder_dilation (int): dilation of the content encoder.
        compressed_channels (int | None): Cm, channels after the channel compressor; None removes the compressor.
        normalizer (str): the kernel normaliser, 'softmax', 'sigmoid' or 'sigmoid_normalized' (Table 14).
        norm (Callable[[int], nn.Module] | None): builds a normalisation layer after the compressor, e.g.
            ``nn.BatchNorm2d``.
        act (Callable[[], nn.Module] | None): builds an activation after that, e.g. ``nn.ReLU``.
        init (str): what a fresh module computes. 'average', the paper's: kernels near uniform. 'nearest' or 'bilinear'
            (``align_corners=False``): that interpolation, for a module that takes its place in a trained network.
            Bilinear kernels read zeros beyond the border, which ``F.interpolate`` repeats: the outermost ``sigma / 2``
            rows and columns are darker. State dicts are the same.
        init_spread (float): the share of a kernel that 'nearest' and 'bilinear' spread evenly over its window, 1e-6 to
            1: at first the output is ``1 - init_spread`` times the interpolation and ``init_spread`` times the window's
            average. The less, the closer to the trained network, and the longer it takes to learn.

    Raises:
        ValueError: an argument is out of its range, or the input has other channels.

    Example:
        >>> import torch
        >>> from carafe_plugin import CARAFEUpsample
        >>> CARAFEUpsample(256)(torch.rand(1, 256, 25, 42)).shape
        torch.Size([1, 256, 50, 84])
        >>> CARAFEUpsample(256)(torch.rand(1, 256, 25, 42), output_size=(49, 84)).shape
        torch.Size([1, 256, 49, 84])

        >>> upsampler, features = CARAFEUpsample(256, init="nearest"), torch.rand(1, 256, 25, 42)
        >>> change = upsampler(features) - torch.nn.functional.interpolate(features, scale_factor=2)
        >>> bool(change.abs().max() < 0.05)
        True
    """

    def __init__(
        self,
        channels: int,
        scale_factor: int | float | Fraction = 2,
        up_kernel: int = 5,
        up_group: int = 1,
        encoder_kernel: int = 3,
        encoder_dilation: int = 1,
        compressed_channels: int | None = 64,
        normalizer: str = "softmax",
        norm: Callable[[int], nn.Module] | None = None,
        act: Callable[[], nn.Module] | None = None,
        init: str = "average",
        init_spread: float = 0.05,
    ) -> None:
        kernel, encoder = (up_kernel, up_group), (encoder_kernel, encoder_dilation)
        super().__init__(
            channels, scale_factor, *kernel, *encoder, compressed_channels, normalizer, norm, act, init, init_spread
        )


class CARAFEDownsample(KernelPrediction):
    """Content-aware downsampling: (N, C, H, W) -> (N, C, ceil(H / sigma), ceil(W / sigma)).

    Paper, Sec. 3 and Fig. 2. It replaces a max pooling or the stride of a convolution. In a backbone the paper adds
    BatchNorm and ReLU after the channel compressor: ``norm=nn.BatchNorm2d, act=nn.ReLU``.

    Args:
        channels (int): C, kept by the operator.
        scale_factor (int | float | fractions.Fraction): sigma, how many times smaller the output is; at least 1
            (2 halves the map).
        down_kernel (int): k of the reassembly, odd.
        down_group (int): G, groups of channels with kernels of their own; divides ``channels``.
        encoder_kernel (int): k_encoder, odd. The paper recommends ``down_kernel - 2``.
        encoder_dilation (int): dilation of the content encoder, whose stride is sigma.
        compressed_channels (int | None): Cm, channels after the channel compressor; None removes the compressor.
        normalizer (str): the kernel normaliser, 'softmax', 'sigmoid' or 'sigmoid_normalized' (Table 14).
        norm (Callable[[int], nn.Module] | None): builds a normalisation layer after the compressor.
        act (Callable[[], nn.Module] | None): builds an activation after that.
        init (str): what a fresh module computes. 'average', the paper's: kernels near uniform. 'stride':
            ``features[..., ::sigma, ::sigma]``; 'average3': ``F.avg_pool2d(features, 3, sigma, 1)``; 'average2': the
            mean of that location and the next, in both directions: with sigma = 2, ``F.avg_pool2d(features, 2)``. They
            are for a module that takes its place in a trained network. State dicts are the same.
        init_spread (float): as for :class:`CARAFEUpsample`.

    Raises:
        ValueError: an argument is out of its range, or the input has other channels.

    Example:
        >>> import torch
        >>> from carafe_plugin import CARAFEDownsample
        >>> CARAFEDownsample(64)(torch.rand(1, 64, 25, 42)).shape
        torch.Size([1, 64, 13, 21])
    """

    downsamples = True
    starts = ("average", "stride", "average2", "average3")

    def __init__(
        self,
        channels: int,
        scale_factor: int | float | Fraction = 2,
        down_kernel: int = 5,
        down_group: int = 1,
        encoder_kernel: int = 3,
        encoder_dilation: int = 1,
        compressed_channels: int | None = 16,
        normalizer: str = "softmax",
        norm: Callable[[int], nn.Module] | None = None,
        act: Callable[[], nn.Module] | None = None,
        init: str = "average",
        init_spread: float = 0.05,
    ) -> None:
        kernel, encoder = (down_kernel, down_group), (encoder_kernel, encoder_dilation)
        super().__init__(
            channels, scale_factor, *kernel, *encoder, compressed_channels, normalizer, norm, act, init, init_spread
        )
