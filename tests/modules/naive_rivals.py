"""The later upsamplers as their papers' formulas say, in loops."""

import math

import torch
import torch.nn.functional as F
from test_peers import centre, conv, sampled


def locations(x):
    """Every (n, i, j) of a batch of maps."""
    return torch.cartesian_prod(*map(torch.arange, (x.shape[0], *x.shape[2:]))).tolist()


def shuffled(x, sigma):
    """Pixel shuffle: channel c * sigma^2 + a * sigma + b becomes phase (a, b) of channel c."""
    out = x.new_zeros(x.shape[0], x.shape[1] // sigma**2, sigma * x.shape[2], sigma * x.shape[3])
    for c, i, j in torch.cartesian_prod(*map(torch.arange, out.shape[1:])).tolist():
        out[:, c, i, j] = x[:, c * sigma**2 + i % sigma * sigma + j % sigma, i // sigma, j // sigma]
    return out


def naive_dysample(module, x):
    sigma, groups = module.scale_factor, module.groups
    source = x if module.style == "lp" else shuffled(x, sigma)
    scope = 1 / 4 if module.scope is None else 1 / 2 / (1 + (-conv(module.scope, source)).exp())
    offsets = scope * conv(module.offset, source)
    if module.style == "lp":
        offsets = shuffled(offsets, sigma)
    out = x.new_zeros(*x.shape[:2], sigma * x.shape[2], sigma * x.shape[3])
    for n, i, j in locations(out):
        for group, channels in enumerate(torch.arange(x.shape[1]).chunk(groups)):
            right, down = offsets[n, group, i, j].item(), offsets[n, groups + group, i, j].item()
            out[n, channels, i, j] = sampled(x[n, channels], centre(module, i) + down, centre(module, j) + right)
    return out


def softmax(values):
    exponentials = (values - values.max(0).values).exp()
    return exponentials / exponentials.sum(0)


def reassembled(x, logits, sigma):
    """Every output as the sum over its source location's k x k window, weighted by the softmax of its logits."""
    reach = (math.isqrt(logits.shape[1]) - 1) // 2
    padded = F.pad(x, [reach] * 4)
    out = x.new_zeros(*x.shape[:2], *logits.shape[2:])
    for n, i, j in locations(out):
        window = padded[n, :, i // sigma : i // sigma + 2 * reach + 1, j // sigma : j // sigma + 2 * reach + 1]
        out[n, :, i, j] = window.flatten(1) @ softmax(logits[n, :, i, j])
    return out


def naive_dlu(module, x):
    sigma, groups, k = module.scale_factor, module.up_group, module.up_kernel
    compressed = conv(module.channel_compressor, x)
    kernels, offsets = conv(module.content_encoder, compressed), shuffled(conv(module.guidance, compressed), sigma)
    padded = F.pad(x, [k // 2] * 4)
    out = x.new_zeros(*x.shape[:2], sigma * x.shape[2], sigma * x.shape[3])
    for n, i, j in locations(out):
        window = padded[n, :, i // sigma : i // sigma + k, j // sigma : j // sigma + k].flatten(1)
        for group, channels in enumerate(torch.arange(x.shape[1]).chunk(groups)):
            right, down = offsets[n, group, i, j].item(), offsets[n, groups + group, i, j].item()
            source = softmax(kernels[n, group * k**2 : (group + 1) * k**2])
            out[n, channels, i, j] = window[channels] @ sampled(source, i // sigma + down, j // sigma + right)
    return out


def repeated(x, sigma, size):
    """Every pixel sigma x sigma times, and of these the first rows and columns."""
    out = x.new_zeros(*x.shape[:2], *size)
    for n, i, j in locations(out):
        out[n, :, i, j] = x[n, :, i // sigma, j // sigma]
    return out


def extended(x, sigma, size):
    """The last row and column once more, where the size to reach is beyond sigma times the map's."""
    x = torch.cat([x, x[:, :, -1:]], 2) if sigma * x.shape[2] < size[0] else x
    return torch.cat([x, x[..., -1:]], 3) if sigma * x.shape[3] < size[1] else x


def naive_fade(module, x, encoder):
    sigma, size = module.scale_factor, encoder.shape[2:]
    x = extended(x, sigma, size)
    shared, bias = module.content_encoder, module.content_encoder.bias[:, None, None]
    fine = conv(shared, conv(module.encoder_compressor, encoder))
    coarse = conv(shared, conv(module.decoder_compressor, x)) - bias
    upsampled = reassembled(x, fine + repeated(coarse, sigma, size), sigma)
    gate = repeated(1 / (1 + (-conv(module.gate, x)).exp()), sigma, size)
    return gate * encoder + (1 - gate) * upsampled


def embedded(linear, norm, point):
    deviations = point - point.mean()
    normalised = deviations / (deviations.square().mean() + 1e-5).sqrt() * norm.weight + norm.bias
    return linear.weight @ normalised + linear.bias


def naive_sapa(module, x, encoder):
    sigma, k, x = module.scale_factor, module.up_kernel, extended(x, module.scale_factor, encoder.shape[2:])
    logits = x.new_zeros(x.shape[0], k**2, *encoder.shape[2:])
    for n, i, j in locations(encoder):
        query = embedded(module.encoder_embedding, module.encoder_norm, encoder[n, :, i, j])
        for tap in range(k**2):
            p, q = i // sigma + tap // k - k // 2, j // sigma + tap % k - k // 2
            if 0 <= p < x.shape[2] and 0 <= q < x.shape[3]:
                key = embedded(module.decoder_embedding, module.decoder_norm, x[n, :, p, q])
                logits[n, tap, i, j] = query @ key
    return reassembled(x, logits, sigma)


def cosines(x):
    """To the eight neighbours, zero to those beyond the map."""
    out = x.new_zeros(x.shape[0], 8, *x.shape[2:])
    around = [(u, v) for u in (-1, 0, 1) for v in (-1, 0, 1) if u or v]
    for n, i, j in locations(x):
        for channel, (u, v) in enumerate(around):
            if 0 <= i + u < x.shape[2] and 0 <= j + v < x.shape[3]:
                a, b = x[n, :, i, j], x[n, :, i + u, j + v]
                out[n, channel, i, j] = a @ b / (a.norm() * b.norm())
    return torch.cat([x, out], 1)


def naive_freqfusion(module, x, encoder):
    sigma, size = module.scale_factor, encoder.shape[2:]
    x = extended(x, sigma, size)

    def sharp(values, fusion):
        return values - reassembled(values, conv(module.high_pass, fusion), 1)

    fine, coarse = conv(module.encoder_compressor, encoder), conv(module.decoder_compressor, x)
    first = fine + repeated(coarse, sigma, size)
    fusion = reassembled(coarse, conv(module.low_pass, first), sigma) + fine + sharp(fine, first)
    smooth = reassembled(x, conv(module.low_pass, fusion), sigma)
    direction, scale = (
        conv(of_fine, cosines(fusion)) + shuffled(conv(of_coarse, cosines(coarse)), sigma)[..., : size[0], : size[1]]
        for of_fine, of_coarse in (
            (module.direction, module.coarse_direction),
            (module.scale, module.coarse_scale),
        )
    )
    offsets = direction / (1 + (-scale).exp())
    groups = offsets.shape[1] // 2
    out = sharp(encoder, fusion)
    for n, i, j in locations(out):
        for group, channels in enumerate(torch.arange(x.shape[1]).chunk(groups)):
            right, down = offsets[n, group, i, j].item(), offsets[n, groups + group, i, j].item()
            out[n, channels, i, j] += sampled(smooth[n, channels], i + down, j + right)
    return out
