"""Losses written out plainly, in float64, for tests that compare values. Nothing of the library is
called here but networks, as black boxes."""

import torch


def dice_per_image(logits, label):
    "1 - soft Dice of every image, smoothed by one pixel, the mean over images and classes but 0."
    values = []
    for z, y in zip(logits, label):
        if len(z) == 1:
            maps = [(1 / (1 + torch.exp(-z[0])), (y == 1).double())]
        else:
            p = torch.exp(z) / torch.exp(z).sum(0)
            maps = [(p[k], (y == k).double()) for k in range(1, len(z))]
        values += [1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1) for p, t in maps]
    return sum(values) / len(values)


def dice_of_batch(logits, label):
    "1 - soft Dice over the batch, smoothed by one pixel, the mean over classes but 0."
    return dice_of_maps(probabilities(logits), label)


def dice_of_maps(p, label):
    "The same of probabilities, or of masks, of all classes (B,K,*s)."
    values = []
    for k in range(1, p.shape[1]):
        inside = (label == k).double()
        values.append(1 - (2 * (p[:, k] * inside).sum() + 1) / (p[:, k].sum() + inside.sum() + 1))
    return sum(values) / len(values)


def cross_entropy(logits, label):
    "-log of the probability of the label, the mean over pixels."
    return -torch.log(probabilities(logits).gather(1, label[:, None])).mean()


def segmentation(kind, logits, label):
    "The four losses that the option `seg` names."
    if kind == "dice":
        return dice_per_image(logits, label)
    if kind == "ce":
        return cross_entropy(logits, label)
    if kind == "dice_ce":
        return dice_per_image(logits, label) + cross_entropy(logits, label)
    return dice_of_batch(logits, label) + cross_entropy(logits, label) / 2


def probabilities(logits, tau=1.0):
    "Softened probabilities (B,K,*s); one logit is two classes."
    z = torch.cat([0 * logits, logits], 1) if logits.shape[1] == 1 else logits
    e = torch.exp(z / tau)
    return e / e.sum(1, keepdim=True)


def soft_labels(student, teacher, tau):
    "tau^2 KL(teacher || student), the mean over pixels."
    p = probabilities(teacher, tau)
    q = probabilities(student, tau)
    return tau**2 * (p * (torch.log(p) - torch.log(q))).sum(1).mean()


def distance(features, others, reduction="mean"):
    "Squared differences, layer by layer."
    total = 0.0
    for f, g in zip(features, others):
        d = (f - g) ** 2
        total = total + (d.sum() / d.numel() if reduction == "mean" else d.sum())
    return total


def generator_loss(scores, kind):
    "Fakes should be scored as real: 1."
    if kind == "lsgan":
        return ((scores - 1) ** 2).mean()
    return torch.log(1 + torch.exp(-scores)).mean()


def discriminator_loss(real, fake, kind, one=1.0):
    "Half for real images (the number `one`), half for fakes (0)."
    if kind == "lsgan":
        return (((real - one) ** 2).mean() + (fake**2).mean()) / 2
    p = 1 / (1 + torch.exp(-real))
    q = 1 / (1 + torch.exp(-fake))
    on_real = -(one * torch.log(p) + (1 - one) * torch.log(1 - p)).mean()
    return (on_real - torch.log(1 - q).mean()) / 2


def gap(a, b):
    "Mean absolute difference."
    return (a - b).abs().sum() / a.numel()


def inside_body(image, side):
    """Positions (side,side) of a map that see the body of an image (H,H) in [-1,1]: a pixel of
    theirs, or of one of the eight around, is above -0.95."""
    step = image.shape[-1] // side
    own = torch.zeros(side, side, dtype=torch.bool)
    for i in range(side):
        for j in range(side):
            block = image[i * step : (i + 1) * step, j * step : (j + 1) * step]
            own[i, j] = bool((block > -0.95).any())
    near = torch.zeros(side, side, dtype=torch.bool)
    for i in range(side):
        for j in range(side):
            around = [
                bool(own[a, b])
                for a in range(max(0, i - 1), min(side, i + 2))
                for b in range(max(0, j - 1), min(side, j + 2))
            ]
            near[i, j] = any(around)
    return near


def context(f, g, h, direction):
    """Contextual loss of features f (C,N) of a generated image against g (C,M) of a real one: every
    real feature must be found (target), or every generated one be near a real one (source)."""
    mean = g.mean(1, keepdim=True)
    x = (f - mean) / (f - mean).norm(dim=0)
    y = (g - mean) / (g - mean).norm(dim=0)
    d = 1 - x.T @ y
    similar = []
    for row in d:  # a generated position against all real ones
        w = torch.exp((1 - row / (row.min() + 1e-5)) / h)
        similar.append(w / w.sum())
    cx = torch.stack(similar)
    found = -torch.log(torch.stack([cx[:, j].max() for j in range(cx.shape[1])]).mean())
    near = -torch.log(torch.stack([cx[i].max() for i in range(cx.shape[0])]).mean())
    return {"target": found, "source": near, "symmetric": (found + near) / 2}[direction]


def taps(net, x, names):
    "Logits and the outputs of the named layers."
    seen = {}
    layers = dict(net.named_modules())
    hooks = [
        layers[n].register_forward_hook(lambda m, i, out, n=n: seen.__setitem__(n, out))
        for n in names
    ]
    logits = net(x)
    for hook in hooks:
        hook.remove()
    return logits, [seen[n] for n in names]
