"""Torch twins of the kernels: the oracle they are tested against and the path of a machine without a GPU.

No Triton in here. One file for each kernel file beside this folder.
"""

from posttrain.kernels.reference.attention import Segments as Segments
from posttrain.kernels.reference.attention import attention as attention
from posttrain.kernels.reference.fp8 import FP8_BLOCK as FP8_BLOCK
from posttrain.kernels.reference.fp8 import dequantize_fp8 as dequantize_fp8
from posttrain.kernels.reference.fp8 import fp8_linear as fp8_linear
from posttrain.kernels.reference.glu import Activation as Activation
from posttrain.kernels.reference.glu import glu as glu
from posttrain.kernels.reference.glu import glu_backward_ as glu_backward_
from posttrain.kernels.reference.glu import glu_forward as glu_forward
from posttrain.kernels.reference.logprobs import token_logprobs as token_logprobs
from posttrain.kernels.reference.lora import Adapted as Adapted
from posttrain.kernels.reference.lora import Dense as Dense
from posttrain.kernels.reference.lora import Frozen as Frozen
from posttrain.kernels.reference.lora import lora_linear as lora_linear
from posttrain.kernels.reference.lora import lora_mlp as lora_mlp
from posttrain.kernels.reference.lora import lora_qkv as lora_qkv
from posttrain.kernels.reference.nf4 import NF4_CODE as NF4_CODE
from posttrain.kernels.reference.nf4 import NestedAbsmax as NestedAbsmax
from posttrain.kernels.reference.nf4 import dequantize_nf4 as dequantize_nf4
from posttrain.kernels.reference.nf4 import nf4_linear as nf4_linear
from posttrain.kernels.reference.norms import add_rms_norm as add_rms_norm
from posttrain.kernels.reference.norms import rms_norm as rms_norm
from posttrain.kernels.reference.rotary import norm_rope as norm_rope
from posttrain.kernels.reference.rotary import rope as rope
