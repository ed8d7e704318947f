"""The Vision Transformer."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxcls.errors import require
from jaxcls.models.layers import (
    ACTIVATIONS,
    INITIALIZERS,
    Conv,
    Style,
    as_input,
    check_fields,
    check_sizes,
    dense,
    drop_path,
    drop_path_rates,
    head,
    norm_act,
    style_of,
)
from jaxcls.models.references import Reference
from jaxcls.models.slices import unstack
from jaxcls.registry import lookup

# What of the tokens [B, 1 + N, D], the class token first, the last layer reads: [B, D].
POOLINGS = {
    'token': lambda x: jax.lax.index_in_dim(x, 0, 1, keepdims=False),
    'mean': lambda x: jnp.mean(jax.lax.slice_in_dim(x, 1, None, axis=1), axis=1),
}


class EncoderBlock(nn.Module):
    """Self-attention, then an MLP, each after a norm and on a shortcut: [B, N, D] -> same.

    `ViT` documents the arguments of the same names; `hidden` is the width inside the MLP.
    """

    heads: int
    hidden: int
    dropout: float
    drop_path: float
    style: Style

    @nn.compact
    def __call__(self, x, *, train: bool):
        style = self.style
        y = norm_act(x, style, train=train, act=False, name='norm1')
        y = attention(y, self.heads, style)
        y = nn.Dropout(self.dropout)(y, deterministic=not train)
        x = x + drop_path(y, self.drop_path, train=train)
        y = norm_act(x, style, train=train, act=False, name='norm2')
        y = dense(y, self.hidden, style, style.kernel_init, name='mlp1')
        y = nn.Dropout(self.dropout)(ACTIVATIONS[style.activation](y), deterministic=not train)
        y = dense(y, x.shape[-1], style, style.kernel_init, name='mlp2')
        y = nn.Dropout(self.dropout)(y, deterministic=not train)
        return x + drop_path(y, self.drop_path, train=train)


def attention(x, heads: int, style: Style):
    """Self-attention of several heads, [B, N, D] -> same. Call it inside a compact method."""
    *shape, width = x.shape
    x = dense(x, 3 * width, style, style.kernel_init, name='qkv')
    x = x.reshape(*shape, 3, heads, width // heads)
    x = jax.nn.dot_product_attention(*unstack(x, 2))
    return dense(x.reshape(*shape, width), width, style, style.kernel_init, name='projection')


class ViT(nn.Module):
    """A Vision Transformer: patches as tokens, blocks of self-attention and MLP, norm, linear layer.

    Dosovitskiy 2020; Touvron 2021 (DeiT) has the small and the tiny one, and the initialisation:
    truncated normal with standard deviation 0.02 for every kernel, the class token, the positions
    and the last layer, zero for biases.

    Call: images [B, H, W, C] float, height and width multiples of `patch_size` -> logits float32
    [B, num_classes], features 'patches' [B, H / patch_size, W / patch_size, width] (embedded,
    without positions), 'block1', ... [B, 1 + patches, width] (the class token, then the patches row
    by row) and 'pooled' (after the norm). The parameter 'position_embedding' belongs to one image
    size; `weights.convert` interpolates it to another.

    Args:
      patch_size: height and width of a patch; 4 for 32x32 images.
      depth: number of blocks.
      width: of the tokens, a multiple of `heads`.
      heads: of every self-attention.
      mlp_ratio: width of the MLPs' hidden layer, as a multiple of `width`.
      pooling: what the last layer reads: the class 'token' or the 'mean' of the patches.
      norm_epsilon: as in the papers, timm and torchvision.
      dropout: rate after the positions are added and after every linear layer but qkv's.
      drop_path: rate of dropping a branch of the last block; from the first block on it grows
        linearly.
      kernel_init: initialiser of patches and blocks; `head_init` is that of the last layer.
    """

    num_classes: int = 10
    patch_size: int = 16
    depth: int = 12
    width: int = 768
    heads: int = 12
    mlp_ratio: float = 4.0
    pooling: str = 'token'
    activation: str = 'gelu'
    norm: str = 'layer'
    norm_epsilon: float = 1e-6
    dropout: float = 0.0
    drop_path: float = 0.0
    kernel_init: str = 'truncated_normal'
    head_init: str = 'truncated_normal'
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        super().__post_init__()
        check_fields(self)
        lookup(POOLINGS, self.pooling, 'pooling')
        sizes = ('patch_size', 'depth', 'width', 'heads')
        check_sizes(**{field: getattr(self, field) for field in sizes})
        divides = self.width % self.heads == 0
        require(divides, 'width', self.width, f'a multiple of heads={self.heads}')
        wide = 1 <= self.mlp_ratio * self.width < 2**31
        expected = f'at least 1 / width={self.width}, and less than 2^31 / width'
        require(wide, 'mlp_ratio', self.mlp_ratio, expected)

    @nn.compact
    def __call__(self, images, *, train: bool = False):
        style = style_of(self)
        patches = self.embed(as_input(images, self.dtype), style)
        features = {'patches': patches}
        x = patches.reshape(patches.shape[0], -1, self.width)
        token = self.tokens('class_token', 1)
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, self.width)), x], axis=1)
        x = x + self.tokens('position_embedding', x.shape[1])
        x = nn.Dropout(self.dropout)(x, deterministic=not train)
        for i, rate in enumerate(drop_path_rates(self.drop_path, self.depth), 1):
            hidden = int(self.mlp_ratio * self.width)
            block = EncoderBlock(self.heads, hidden, self.dropout, rate, style, name=f'block{i}')
            x = features[f'block{i}'] = block(x, train=train)
        # A layer norm is of each token, so only what is read has to be normalised. With the mean this
        # order is timm's (fc_norm).
        x = POOLINGS[self.pooling](x)
        x = features['pooled'] = norm_act(x, style, train=train, act=False, name='norm')
        return head(x, self.num_classes, style, self.head_init), features

    def embed(self, images, style: Style):
        """Every patch as a token: [B, H, W, C] -> [B, H / patch_size, W / patch_size, width]."""
        size, patch = images.shape[1:3], self.patch_size
        fits = size[0] % patch == 0 and size[1] % patch == 0
        require(fits, 'The size of the images', size, f'a multiple of patch_size={patch}')
        layer = Conv(
            self.width, patch, style, stride=patch, padding=0, use_bias=True, name='patches'
        )
        return layer(images)

    def tokens(self, name: str, count: int):
        """A parameter [1, count, width], in the compute dtype."""
        shape = (1, count, self.width)
        initializer = INITIALIZERS['truncated_normal']
        return self.param(name, initializer, shape, self.param_dtype).astype(self.dtype)


MODELS = {
    'vit_ti16': partial(ViT, width=192, heads=3),
    'vit_s16': partial(ViT, width=384, heads=6),
    'vit_b16': ViT,
}

_DOSOVITSKIY = 'Dosovitskiy 2020, https://arxiv.org/abs/2010.11929'
_TOUVRON = 'Touvron 2021, https://arxiv.org/abs/2012.12877'
REFERENCES = {
    'vit_ti16': Reference(_TOUVRON, 5_717_416, top1=72.2, source='DeiT-Ti, Touvron 2021'),
    'vit_s16': Reference(_TOUVRON, 22_050_664, top1=79.8, source='DeiT-S, Touvron 2021'),
    'vit_b16': Reference(_DOSOVITSKIY, 86_567_656, top1=81.07, source='torchvision IMAGENET1K_V1'),
}

_LEAF = {'kernel': 'weight', 'bias': 'bias'}
_BLOCK = 'encoder.layers.encoder_layer_'
NAMES = {
    'timm': (
        (r'patches', lambda _: 'patch_embed.proj'),
        (r'class_token', lambda _: 'cls_token'),
        (r'position_embedding', lambda _: 'pos_embed'),
        (r'block(\d+)/norm(\d)', lambda _, b, k: f'blocks.{b - 1}.norm{k}'),
        (r'block(\d+)/qkv', lambda _, b: f'blocks.{b - 1}.attn.qkv'),
        (r'block(\d+)/projection', lambda _, b: f'blocks.{b - 1}.attn.proj'),
        (r'block(\d+)/mlp(\d)', lambda _, b, k: f'blocks.{b - 1}.mlp.fc{k}'),
        (r'norm', lambda layout: 'norm' if layout.model.pooling == 'token' else 'fc_norm'),
        (r'head', lambda _: 'head'),
    ),
    'torchvision': (
        (r'patches', lambda _: 'conv_proj'),
        (r'class_token', lambda _: 'class_token'),
        (r'position_embedding', lambda _: 'encoder.pos_embedding'),
        (r'block(\d+)/norm(\d)', lambda _, b, k: f'{_BLOCK}{b - 1}.ln_{k}'),
        (
            r'block(\d+)/qkv/(\w+)',
            lambda _, b, leaf: f'{_BLOCK}{b - 1}.self_attention.in_proj_{_LEAF[leaf]}',
        ),
        (r'block(\d+)/projection', lambda _, b: f'{_BLOCK}{b - 1}.self_attention.out_proj'),
        (r'block(\d+)/mlp(\d)', lambda _, b, k: f'{_BLOCK}{b - 1}.mlp.{3 * (k - 1)}'),
        (r'norm', lambda _: 'encoder.ln'),
        (r'head', lambda _: 'heads.head'),
    ),
}
