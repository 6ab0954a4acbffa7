"""Eq. 3 of the paper as plain loops over Python numbers: independent of the reference in every line."""

import math

import torch


def naive_carafe(features, masks, kernel_size, group_size, scale):
    n, c, h, w = features.shape
    out_h, out_w = math.ceil(h * scale), math.ceil(w * scale)
    r = (kernel_size - 1) // 2
    x, m = features.tolist(), masks.tolist()
    output = torch.zeros(n, c, out_h, out_w, dtype=torch.float64)
    for b in range(n):
        for ch in range(c):
            group = ch * group_size // c
            for i_out in range(out_h):
                for j_out in range(out_w):
                    i, j = math.floor(i_out / scale), math.floor(j_out / scale)
                    total = 0.0
                    for u in range(-r, r + 1):
                        for v in range(-r, r + 1):
                            if 0 <= i + u < h and 0 <= j + v < w:
                                tap = group * kernel_size**2 + (u + r) * kernel_size + (v + r)
                                total += m[b][tap][i_out][j_out] * x[b][ch][i + u][j + v]
                    output[b, ch, i_out, j_out] = total
    return output
