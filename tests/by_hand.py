<<<<<<< HEAD
"""Formulas of LOTUS written out in float64, with plain torch: what tests of values compare with.

`P` holds all weights and buffers by name, as float64 leaves; nothing of the library is called.
"""

import torch
import torch.nn.functional as F

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
def probabilities(x, tau=1.0):
    "Softmax over axis 1; one channel is a coin: the other side has the score 0."
    x = x / tau
    if x.shape[1] == 1:
        x = torch.cat([torch.zeros_like(x), x], 1)
    return x.softmax(1)


def divergence(p, q):
    "KL(p || q) over axis 1."
    return (p * (p.log() - q.log())).sum(1)


def directed(p_s, p_t, direction):
    if direction == "forward":
        return divergence(p_t, p_s)
    if direction == "reverse":
        return divergence(p_s, p_t)
    return (divergence(p_t, p_s) + divergence(p_s, p_t)) / 2


def cross_entropy(x, y):
    p = probabilities(x)
    return -p.gather(1, y[:, None]).log().mean()


def dice(p, y):
    "Soft Dice loss over the batch, mean over the foreground classes, smoothed by one pixel."
    terms = []
    for k in range(1, p.shape[1]):
        inside = (y == k).double()
        terms.append(1 - (2 * (p[:, k] * inside).sum() + 1) / (p[:, k].sum() + inside.sum() + 1))
    return sum(terms) / len(terms)


def segmentation(x, y, bce=0.5):
    return dice(probabilities(x), y) + bce * cross_entropy(x, y)


def released_segmentation(x, y, bce=0.5):
    "Dice of the mask; for several classes the softmax is taken twice."
    p = probabilities(x.detach())
    mask = F.one_hot(p.argmax(1), p.shape[1]).movedim(-1, 1).double()
    if x.shape[1] > 1:
        x = x.softmax(1)
    return dice(mask, y) + bce * cross_entropy(x, y)


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
=======
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
    if logits.shape[1] == 1:
        maps = [(1 / (1 + torch.exp(-logits[:, 0])), (label == 1).double())]
    else:
        p = torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True)
        maps = [(p[:, k], (label == k).double()) for k in range(1, logits.shape[1])]
    values = [1 - (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1) for p, t in maps]
    return sum(values) / len(values)


def cross_entropy(logits, label):
    "-log of the probability of the label, the mean over pixels."
    if logits.shape[1] == 1:
        p = 1 / (1 + torch.exp(-logits[:, 0]))
        return -torch.log(torch.where(label == 1, p, 1 - p)).mean()
    p = torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True)
    return -torch.log(p.gather(1, label[:, None])).mean()


def segmentation(kind, logits, label):
    "The four losses that the option `seg` names."
    if kind == "dice":
        return dice_per_image(logits, label)
    if kind == "ce":
        return cross_entropy(logits, label)
    if kind == "dice_ce":
        return dice_per_image(logits, label) + cross_entropy(logits, label)
    return dice_of_batch(logits, label) + cross_entropy(logits, label) / 2


def probabilities(logits, tau):
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
>>>>>>> cmedl
