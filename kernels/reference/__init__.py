"""Torch twins of the kernels: the oracle they are tested against and the path of a machine without a GPU.

No Triton in here. One file for each kernel file beside this folder.
"""

from posttrain.kernels.reference.attention import Segments as Segments
from posttrain.kernels.reference.attention import attention as attention
from posttrain.kernels.reference.fp8 import FP8_BLOCK as FP8_BLOCK
from posttrain.kernels.reference.fp8 import fp8_linear as fp8_linear
from posttrain.kernels.reference.fp8 import fp8_weight as fp8_weight
from posttrain.kernels.reference.logprobs import token_logprobs as token_logprobs
