"""Classify torch's operations for the audit.

Names are those of aten, without the underscore of in-place forms.
"""
import torch

__all__ = ['kind_of', 'op_name', 'attention_name', 'CURVED_REDUCTIONS', 'EXCUSED_IN_NORMS', 'SLICES']

# results do not depend on the values of the input
_CONSTANT = {
    'empty_like', 'zeros_like', 'ones_like', 'full_like', 'rand_like', 'randn_like', 'randint_like', 'new_empty',
    'new_zeros', 'new_ones', 'new_full', 'new_empty_strided', 'zero', 'fill', 'uniform', 'normal', 'exponential',
    'random', 'sym_size', 'sym_stride', 'sym_numel', 'size', 'stride', 'is_same_size', 'isnan', 'isinf', 'isfinite',
}
_ESCAPES = {'_local_scalar_dense', 'item', 'is_nonzero', 'equal', 'nonzero'}

# same elements in another order or shape
_VIEWS = {
    'view', '_unsafe_view', 'reshape', '_reshape_alias', 'permute', 'transpose', 't', 'expand', 'squeeze', 'unsqueeze',
    'alias', 'detach', 'lift_fresh', 'movedim', 'numpy_T', 'view_as_real', 'view_as_complex', '_conj',
    'resolve_conj', 'resolve_neg', 'flatten', 'unflatten', 'contiguous', 'expand_as', 'view_as',
}
SLICES = {
    'slice', 'select', 'split', 'split_with_sizes', 'unsafe_split', 'unsafe_split_with_sizes', 'chunk', 'unsafe_chunk',
    'unbind', 'narrow', 'unfold', 'diagonal', 'as_strided',
}
# a subset of the elements, elements of several tensors, or linear combinations of neighbours
_LINEAR = {
    *SLICES, 'as_strided_copy', 'cat', 'stack', 'hstack', 'concat',
    'index', '_unsafe_index', 'index_select', 'gather', 'take', 'take_along_dim', 'flip', 'roll', 'repeat', 'tile',
    'repeat_interleave', 'constant_pad_nd', 'pad', 'reflection_pad1d', 'reflection_pad2d', 'reflection_pad3d',
    'replication_pad1d', 'replication_pad2d', 'replication_pad3d', 'pixel_shuffle', 'pixel_unshuffle',
    'channel_shuffle', 'native_channel_shuffle', 'im2col', 'col2im', 'grid_sampler_2d', 'grid_sampler_3d',
    'grid_sampler', 'tril', 'triu', 'diag_embed', 'slice_scatter', 'select_scatter', 'diagonal_scatter', 'index_put',
    '_index_put_impl', '_unsafe_index_put', 'index_add', 'index_copy', 'index_fill', 'scatter', 'scatter_add',
    'masked_select', 'masked_scatter', 'cumsum', 'rot90', 'trace', 'block_diag', 'slice_copy', 'select_copy',
    'split_copy', 'unbind_copy', 'max_unpool2d', 'complex', 'view_as_complex_copy', 'unfold_copy', 'native_dropout',
    '_fft_r2c', '_fft_c2r', '_fft_c2c', 'reverse', 'combinations', 'renorm', 'affine_grid_generator',
}
_INTERPOLATES = ('upsample_', '_upsample_', '_adaptive_avg_pool', 'adaptive_avg_pool', 'avg_pool')
_REDUCTIONS = {
    'mean', 'sum', 'nanmean', 'nansum', 'amax', 'amin', 'aminmax', 'max', 'min', 'any', 'all', 'cummax',
    'count_nonzero',
    'max_pool2d', 'max_pool1d', 'max_pool3d', 'max_pool2d_with_indices', 'max_pool3d_with_indices',
    'max_pool1d_with_indices', 'mkldnn_max_pool2d', 'adaptive_max_pool1d', 'adaptive_max_pool2d',
    'adaptive_max_pool3d', 'fractional_max_pool2d', 'trapezoid',
}
CURVED_REDUCTIONS = {
    'var', 'std', 'var_mean', 'std_mean', 'norm', 'linalg_vector_norm', 'logsumexp', 'prod', 'median', 'mode', 'argmax',
    'argmin', 'topk', 'sort', 'argsort', 'kthvalue', 'cumprod', 'bernoulli', 'multinomial', 'histc', 'bucketize',
    'searchsorted', 'one_hot', 'linalg_matrix_norm',
}
# layers: an event that reaches one of them is decided
_LAYERS = {
    'convolution', '_convolution', 'mkldnn_convolution', 'thnn_conv2d', 'conv_depthwise3d', 'mm', 'addmm', 'bmm',
    'baddbmm', 'addbmm', 'addmv', 'mv', 'dot', 'vdot', 'matmul', 'linear', 'mkldnn_linear', '_trilinear', 'bilinear',
    'native_layer_norm', 'native_group_norm', 'native_batch_norm', '_native_batch_norm_legit',
    '_native_batch_norm_legit_no_training', '_batch_norm_with_update', '_batch_norm_no_update',
    'cudnn_batch_norm', 'miopen_batch_norm', '_fused_rms_norm', 'rms_norm', 'embedding', 'embedding_bag',
    '_embedding_bag', '_weight_norm_interface', 'conv_tbc', 'outer', 'ger', 'addr', 'chain_matmul',
    'linalg_multi_dot', 'mkldnn_rnn_layer', '_cdist_forward', '_euclidean_dist',
}
_ATTENTION = {
    '_softmax', '_log_softmax', 'softmax', 'log_softmax', '_safe_softmax', '_masked_softmax', 'glu', '_addmm_softmax',
    '_scaled_dot_product_flash_attention', '_scaled_dot_product_flash_attention_for_cpu',
    '_scaled_dot_product_efficient_attention', '_scaled_dot_product_cudnn_attention',
    '_scaled_dot_product_attention_math', '_scaled_dot_product_fused_attention_overrideable',
    '_scaled_dot_product_attention_math_for_mps', 'scaled_dot_product_attention', '_native_multi_head_attention',
}
_SUMS = {'add', 'sub', 'rsub', 'neg', 'clone', 'positive', 'real', 'imag', 'conj_physical'}
_CURVED = {  # pointwise operations that torch does not tag as pointwise
    'hardswish', 'log_sigmoid_forward', '_prelu_kernel', 'prelu', 'rrelu_with_noise', 'rrelu', 'masked_fill',
    'fake_quantize_per_tensor_affine', 'fake_quantize_per_channel_affine', '_fused_moving_avg_obs_fq_helper',
    'fake_quantize_per_tensor_affine_cachemask', 'fake_quantize_per_channel_affine_cachemask', 'hardtanh', 'softplus',
    'quantize_per_tensor', 'quantize_per_channel', 'dequantize', 'float_power', 'polar', 'frexp',
}

# parts of a normalisation: excused in a statistic that only scales the tensor that it was computed from
EXCUSED_IN_NORMS = {
    'pow', 'sqrt', 'rsqrt', 'reciprocal', 'div', 'clamp_min', 'clamp', 'abs', 'mul', 'maximum', 'square', 'log',
    *CURVED_REDUCTIONS,
}


def op_name(func: torch._ops.OpOverload) -> str:
    """Return the name of an operation without overload and in-place underscore. Outside aten, the namespace is kept."""
    space, name = func._schema.name.split('::')
    if space == 'aten':
        return name if name.startswith('__') else name.rstrip('_')
    return f'{space}::{name}'


def attention_name(name: str) -> str:
    """Return the name of a softmax or attention for reports. The kernel's name differs between devices."""
    if 'log_softmax' in name or name == 'glu':
        return name.lstrip('_')
    return 'softmax'


def kind_of(name: str, func: torch._ops.OpOverload) -> str:
    """Return the kind of an operation.

    One of 'constant', 'escape', 'view', 'linear', 'reduction', 'curved reduction', 'layer', 'attention', 'sum', 'copy',
    'cast', 'mul', 'div', 'where', 'elementwise'; 'opaque' for an operation that the audit does not know.
    """
    for kind, names in _KINDS.items():
        if name in names:
            return kind
    if name.startswith(_INTERPOLATES):
        return 'reduction' if 'pool' in name else 'linear'
    return 'elementwise' if torch.Tag.pointwise in func.tags else 'opaque'


_KINDS = {
    'constant': _CONSTANT, 'escape': _ESCAPES, 'view': _VIEWS, 'linear': _LINEAR, 'reduction': _REDUCTIONS,
    'curved reduction': CURVED_REDUCTIONS, 'layer': _LAYERS, 'attention': _ATTENTION, 'sum': _SUMS,
    'copy': {'copy'}, 'cast': {'_to_copy', 'to', '_to_dense'}, 'mul': {'mul', 'multiply'},
    'div': {'div', 'true_divide'}, 'where': {'where', 'masked_fill'}, 'elementwise': _CURVED,
}
