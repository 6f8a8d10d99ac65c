"""A slow, readable LoQT: Algorithms 1 and 2 on dense tensors, with nothing of the package.

The update of step t captures the gradient at deq(Q) + s·PB, which is the gradient at the merged weight, lets the optimizer
step B as always, and switches afterwards.
"""

import torch
from bitsandbytes.functional import dequantize_blockwise, get_4bit_type, quantize_4bit


def quantize_dequantize(X, quant_type, double_quant=False):
    """What X `[rows, columns]` is after a trip through 4 bits; X itself if `quant_type` is None."""
    if quant_type is None:
        return X.clone()
    return dequantize(
        *quantize_4bit(X.contiguous(), blocksize=64, quant_type=quant_type, compress_statistics=double_quant)
    )


def dequantize(codes, state):
    """What bitsandbytes' 4-bit codes stand for, written out: of each 64 elements in a row the levels times their absmax.

    Not `dequantize_4bit`: that of 0.50.2 is wrong on some processors.
    """
    absmax = state.absmax
    if state.nested:
        absmax = dequantize_blockwise(absmax, state.state2) + state.offset
    # the first of two codes lies in the upper half of a byte
    codes = torch.stack([codes.flatten() >> 4, codes.flatten() & 15], dim=1).flatten()[: state.shape.numel()]
    levels = get_4bit_type(state.quant_type, device="cpu")[codes.long()]
    values = levels * absmax.float().repeat_interleave(64)[: len(levels)]
    return values.view(state.shape).to(state.dtype)


def top_singular_vectors(G, r):
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    vectors = Vh[:r] if G.shape[1] <= G.shape[0] else U[:, :r].T
    # the convention for the sign, which a singular vector leaves open: its largest entry is positive
    vectors = torch.stack([v if v[v.abs().argmax()] > 0 else -v for v in vectors])
    return vectors if G.shape[1] <= G.shape[0] else vectors.T


class ReferenceLinear:
    """One weight `[out, in]` with its P and B, all dense float32."""

    def __init__(self, W, r, s, K, quantize_weight, quantize_projection, double_quant=False, error_feedback=False):
        self.right = W.shape[1] <= W.shape[0]
        self.Q, self.r, self.s, self.K = W.clone(), r, s, K
        self.formats = (quantize_weight, quantize_projection, double_quant)
        # what W lacks, if it is kept
        self.error, self.error_feedback = torch.zeros_like(W), error_feedback
        self.P = torch.zeros((r, W.shape[1]) if self.right else (W.shape[0], r))
        self.B = torch.zeros((W.shape[0], r) if self.right else (r, W.shape[1]), requires_grad=True)

    def low_rank(self, B):
        return self.s * (B @ self.P if self.right else self.P @ B)

    def weight(self):
        return self.Q + self.low_rank(self.B)

    def forward(self, x):
        return x @ self.weight().T

    @torch.no_grad()
    def switch(self, G):
        quantize_weight, quantize_projection, double_quant = self.formats
        W = self.weight() + self.error
        self.P = quantize_dequantize(top_singular_vectors(G, self.r), quantize_projection, double_quant)
        # Algorithm 2
        Q, B = quantize_dequantize(W, quantize_weight, double_quant), torch.zeros_like(self.B)
        best = (torch.linalg.norm(W - Q), Q, B)
        for _ in range(self.K):
            Q = quantize_dequantize(W - self.low_rank(B), quantize_weight, double_quant)
            residual = (W - Q) / self.s
            pinv = torch.linalg.pinv(self.P)
            B = residual @ pinv if self.right else pinv @ residual
            error = torch.linalg.norm(W - Q - self.low_rank(B))
            if error < best[0]:
                best = (error, Q, B)
        self.Q = best[1]
        self.B.copy_(best[2])
        if self.error_feedback:
            self.error = quantize_dequantize(W - self.weight(), quantize_weight, double_quant)

    @torch.no_grad()
    def synchronize(self, layer, adapter_name="default"):
        """Go on from the state of a LoQT layer."""
        self.P = layer.projection(adapter_name)
        self.B.copy_(layer.loqt_B[adapter_name])
        self.Q = layer.effective_weight(adapter_name) - self.low_rank(self.B)
        if self.error_feedback:
            self.error = layer.weight_format(adapter_name).unpack(layer.loqt_error[adapter_name])
