"""Slow, plain-loop truths for detection's geometry, written from the definitions, in float64.

In: small arrays. Out: arrays or lists. Nothing here uses the code under test.
"""

import math

import numpy as np


def overlap(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    total = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / total if total else float("nan")


def greedy_nms(boxes, scores, threshold, groups=None):
    """Indices kept: go down the scores, keep a box unless a kept one of its group overlaps it."""
    kept = []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        same = [j for j in kept if groups is None or groups[i] == groups[j]]
        if not any(overlap(boxes[i], boxes[j]) > threshold for j in same):
            kept.append(i)
    return kept


def bilinear(plane, y, x):
    """The value of a map at a point; up to one pixel outside the edge counts, beyond is zero."""
    height, width = plane.shape
    if y < -1 or y > height or x < -1 or x > width:
        return 0.0
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    top, left = math.floor(y), math.floor(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    v, u = y - top, x - left
    above = plane[top, left] * (1 - u) + plane[top, right] * u
    below = plane[bottom, left] * (1 - u) + plane[bottom, right] * u
    return above * (1 - v) + below * v


def roi_align(maps, rois, side, scale):
    """Mean of ceil(extent / side) samples per axis and cell, half a pixel off the map's corner."""
    out = np.zeros((len(rois), maps.shape[1], side, side))
    for n, (index, x1, y1, x2, y2) in enumerate(rois):
        left, top = x1 * scale - 0.5, y1 * scale - 0.5
        width, height = (x2 - x1) * scale, (y2 - y1) * scale
        across, down = math.ceil(width / side), math.ceil(height / side)
        for channel in range(maps.shape[1]):
            plane = maps[int(index), channel]
            for row in range(side):
                for column in range(side):
                    total = 0.0
                    for i in range(down):
                        for j in range(across):
                            y = top + (row + (i + 0.5) / down) * height / side
                            x = left + (column + (j + 0.5) / across) * width / side
                            total += bilinear(plane, y, x)
                    out[n, channel, row, column] = total / max(down * across, 1)
    return out


def paste(small, box, size):
    """A mask over its box: each pixel's centre sampled, zero outside, cut at one half."""
    height, width = size
    padded = np.pad(small, 1)
    out = np.zeros(size, dtype=bool)
    for row in range(height):
        for column in range(width):
            y = (row + 0.5 - box[1]) / (box[3] - box[1]) * small.shape[0] - 0.5
            x = (column + 0.5 - box[0]) / (box[2] - box[0]) * small.shape[1] - 0.5
            inside = -1 < y < small.shape[0] and -1 < x < small.shape[1]
            out[row, column] = inside and bilinear(padded, y + 1, x + 1) >= 0.5
    return out


def decode(reference, delta, stds, size=None):
    x1, y1, x2, y2 = reference
    dx, dy, dw, dh = (d * s for d, s in zip(delta, stds, strict=True))
    limit = math.log(1000 / 16)
    width = (x2 - x1) * math.exp(min(max(dw, -limit), limit))
    height = (y2 - y1) * math.exp(min(max(dh, -limit), limit))
    x, y = (x1 + x2) / 2 + dx * (x2 - x1), (y1 + y2) / 2 + dy * (y2 - y1)
    box = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
    if size is not None:
        box = [min(max(v, 0.0), size[1 - i % 2]) for i, v in enumerate(box)]
    return box


def assign(boxes, truth, positive, negative, least, low_quality):
    """Object of each box, -1 for background, -2 for neither; thresholds as in Faster R-CNN."""
    out = []
    for box in boxes:
        overlaps = [overlap(box, t) for t in truth]
        best = max(overlaps, default=0.0)
        if best >= positive:
            out.append(overlaps.index(best))
        else:
            out.append(-1 if best < negative else -2)
    for number, t in enumerate(truth) if low_quality else ():
        overlaps = [overlap(box, t) for box in boxes]
        best = max(overlaps, default=0.0)
        if best >= least:
            for i, value in enumerate(overlaps):
                if value == best:
                    out[i] = number
    return out
