"""Formulas of LOTUS written out in float64, with plain torch: what tests of values compare with.

`P` holds all weights and buffers by name, as float64 leaves; nothing of the library is called.
"""

import torch
import torch.nn.functional as F
from by_hand import cross_entropy, dice_of_batch, dice_of_maps, probabilities

ALPHA_BAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)


def doubles(**networks):
    "{name of the network.name of the tensor: float64 copy, with gradient if it is a weight}."
    out = {}
    for name, net in networks.items():
        for k, v in net.named_parameters():
            out[f"{name}.{k}"] = v.detach().double().requires_grad_()
        for k, v in net.named_buffers():
            out[f"{name}.{k}"] = v.detach().double()
    return out


# ---------------------------------------------------------------- layers
def conv(P, name, x):
    "1x1 or 3x3 convolution that keeps the size."
    w = P[f"{name}.weight"]
    return F.conv2d(x, w, P[f"{name}.bias"], padding=w.shape[-1] // 2)


def norm(P, name, x, train):
    "Batch normalisation by the batch's statistics, or by the running ones."
    if train:
        mean = x.mean((0, 2, 3))
        var = x.var((0, 2, 3), unbiased=False)
    else:
        mean = P[f"{name}.running_mean"]
        var = P[f"{name}.running_var"]
    shape = (1, -1, 1, 1)
    out = (x - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt()
    return out * P[f"{name}.weight"].view(shape) + P[f"{name}.bias"].view(shape)


def bottleneck(P, name, x, train):
    h = norm(P, f"{name}.body.1", conv(P, f"{name}.body.0", x), train).clamp_min(0)
    h = norm(P, f"{name}.body.4", conv(P, f"{name}.body.3", h), train).clamp_min(0)
    return x + norm(P, f"{name}.body.7", conv(P, f"{name}.body.6", h), train)


def phi(P, name, z, t, train):
    "The noise predictor; `t` is one step for each image."
    h = z + P[f"{name}.step.weight"][t][:, :, None, None]
    h = bottleneck(P, f"{name}.body.0", h, train)
    h = bottleneck(P, f"{name}.body.1", h, train)
    return norm(P, f"{name}.body.3", conv(P, f"{name}.body.2", h), train)


def gamma(P, name, z, train):
    "The share of signal that the noise adapter reads from `trans`formed features."
    h = bottleneck(P, f"{name}.adapter.body", z, train).mean((2, 3))
    scores = h @ P[f"{name}.adapter.head.weight"].T + P[f"{name}.adapter.head.bias"]
    return scores.softmax(1)[:, 0]


def denoise(P, name, z, eps, train, phi_train, fresh=None, eta=0.0):
    "Blend with noise, five DDIM steps from 400 to 0, one projection."
    z = conv(P, f"{name}.trans", z)
    g = gamma(P, name, z, train)[:, None, None, None]
    z = g * z + (1 - g) * eps
    for i, t in enumerate((400, 300, 200, 100, 0)):
        a = ALPHA_BAR[t]
        a_next = ALPHA_BAR[t - 100] if t else torch.ones((), dtype=torch.float64)
        e = phi(P, f"{name}.phi", z, torch.full((len(z),), t), phi_train)
        clean = (z - (1 - a).sqrt() * e) / a.sqrt()
        sigma = eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)).sqrt()
        z = a_next.sqrt() * clean + (1 - a_next - sigma**2).clamp_min(0).sqrt() * e
        if fresh is not None:
            z = z + sigma * fresh[i]
    return norm(P, f"{name}.proj.1", conv(P, f"{name}.proj.0", z), train)


# ---------------------------------------------------------------- losses
def divergence(p, q):
    "KL(p || q) over axis 1."
    return (p * (p.log() - q.log())).sum(1)


def directed(p_s, p_t, direction):
    if direction == "forward":
        return divergence(p_t, p_s)
    if direction == "reverse":
        return divergence(p_s, p_t)
    return (divergence(p_t, p_s) + divergence(p_s, p_t)) / 2


def segmentation(x, y, bce=0.5):
    return dice_of_batch(x, y) + bce * cross_entropy(x, y)


def released_segmentation(x, y, bce=0.5):
    "Dice of the mask; for several classes the softmax is taken twice."
    p = probabilities(x.detach())
    mask = F.one_hot(p.argmax(1), p.shape[1]).movedim(-1, 1).double()
    if x.shape[1] > 1:
        x = x.softmax(1)
    return dice_of_maps(mask, y) + bce * cross_entropy(x, y)


def class_mean_kl(x_s, y_s, x_t, y_t, classes, tau, direction="symmetric"):
    "Mean scores of each class over the batch, softened, compared; classes on both sides only."
    terms = []
    for k in range(classes):
        if not ((y_s == k).any() and (y_t == k).any()):
            continue
        mean_s = x_s.movedim(1, -1)[y_s == k].mean(0)[None]
        mean_t = x_t.movedim(1, -1)[y_t == k].mean(0)[None]
        p_s, p_t = probabilities(mean_s, tau), probabilities(mean_t, tau)
        terms.append(directed(p_s, p_t, direction)[0])
    return sum(terms) / len(terms)


def variation(f, y, classes):
    "Cosine of every pixel with the mean of its class in its image, (B,H,W); 0 for other labels."
    out = torch.zeros(y.shape, dtype=torch.float64)
    for b in range(len(f)):
        for k in range(classes):
            inside = y[b] == k
            if inside.any():
                own = f[b][:, inside]
                centre = own.mean(1, keepdim=True)
                out = out.clone()
                out[b, inside] = F.cosine_similarity(own, centre.expand_as(own), 0)
    return out


def share_means(values, n):
    "Means of n equal shares of sorted values: each value n times, in n groups."
    return values.sort().values.repeat_interleave(n).reshape(n, -1).mean(1)


def class_ifv(f_s, y_s, f_t, y_t, classes, n=32, only=None):
    m_s, m_t = variation(f_s, y_s, classes), variation(f_t, y_t, classes)
    terms = []
    for k in only or range(classes):
        a, b = m_s[y_s == k], m_t[y_t == k]
        if len(a) and len(b):
            terms.append((share_means(a, n) - share_means(b, n)).square().mean())
    return sum(terms) / len(terms)


def released_ifv(x_s, y_s, x_t, y_t, only):
    "On logits: prototypes of listed classes, elsewhere 1."
    maps = []
    for x, y in ((x_s, y_s), (x_t, y_t)):
        listed = torch.isin(y, torch.tensor(only))
        m = variation(x, torch.where(listed, y, -1), max(only) + 1)
        maps.append(torch.where(listed, m, 1.0))
    return (maps[0] - maps[1]).square().mean()
