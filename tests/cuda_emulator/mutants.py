"""Tests the tests of the CUDA kernels: breaks the kernels one line at a time, and lists breaks that no test detects.

python tests/cuda_emulator/mutants.py [WORD ...]     only those whose name contains a word
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import emulated_tests

# A file, a text, and its replacement: a mutant for each occurrence; also, each line of __syncthreads() is removed.
MUTATIONS = [
    ("cuda/vector_access.cuh", "if (thread < row_begin) on_element(thread);", ""),
    ("cuda/vector_access.cuh", "if (row_end + thread < size) on_element(row_end + thread);", ""),
    ("cuda/vector_access.cuh", "first + (kPacks - 1) * step < range.end", "first < range.end"),
    ("cuda/vector_access.cuh", "if (first + i * step < range.end) rest[i]", "if (i < kPacks - 2) rest[i]"),
    ("cuda/vector_access.cuh", "if (first + i * step >= range.end) break;", "if (first >= range.end) break;"),
    ("cuda/vector_access.cuh", "(size - row_begin) / kVector<T>", "(size - row_begin + kVector<T> - 1) / kVector<T>"),
    ("cuda/vector_access.cuh", "return min(size, past", "return max(0, past"),
    ("cuda/vector_access.cuh", "past == 0 ? 0 : (kVectorBytes - past)", "0 * (kVectorBytes - past)"),
    (
        "cuda/vector_access.cuh",
        "return (reinterpret_cast<uintptr_t>(a) - reinterpret_cast<uintptr_t>(b)) % kVectorBytes == 0;",
        "return true;",
    ),
    ("cuda/block_reduce.cuh", "if (distance < lanes)", "if (distance < lanes - 1)"),
    ("cuda/block_reduce.cuh", "if (lane == 0) of_warp", "if (lane == 1) of_warp"),
    ("cuda/rows.cuh", "z == infinity<A>() ? not_a_number<A>() : A(1)", "A(1)"),
    ("cuda/rows.cuh", "max = larger(z[i][k], max);", "max = z[i][k];"),
    ("cuda/rows.cuh", "for (int i = kCount - 1; i >= 0; --i) {", "for (int i = 0; i < kCount; ++i) {"),
    ("cuda/rows.cuh", "for (int k = kVector<T> - 1; k >= 0; --k) {", "for (int k = 0; k < kVector<T>; ++k) {"),
    ("cuda/rows.cuh", "i < kCount; ++i) row.sum += sums[i];", "i < 1; ++i) row.sum += sums[i];"),
    # The largest of 16-bit numbers, found in pairs.
    ("cuda/rows.cuh", "for (int k = 1; k < words.kCount; ++k)", "for (int k = 2; k < words.kCount; ++k)"),
    ("cuda/rows.cuh", "for (int i = 1; i < kCount; ++i) largest", "for (int i = 1; i < kCount - 1; ++i) largest"),
    ("cuda/rows.cuh", "return larger(pair.x, larger(pair.y, number));", "return larger(pair.x, number);"),
    ("cuda/rows.cuh", "return larger(pair.x, larger(pair.y, number));", "return larger(pair.y, number);"),
    ("cuda/rows.cuh", "return larger(pair.x, larger(pair.y, number));", "return larger(pair.x, pair.y);"),
    ("cuda/vector_access.cuh", "numbers[2 * i + 1] = pair.y;", "numbers[2 * i + 1] = pair.x;"),
    ("cuda/rows.cuh", "const A shift = exp_shift(max);", "const A shift = max;"),
    ("cuda/rows.cuh", "row.sum *= exp_nonpositive(row.max - shift);", ""),
    ("row_loss.h", "a.sum * exp_nonpositive(a.max - shift)", "a.sum"),
    ("row_loss.h", "b.sum * exp_nonpositive(b.max - shift)", "b.sum"),
    ("row_loss.h", "larger(a.max, b.max), shift = exp_shift(max)", "larger(a.max, b.max), shift = max"),
    # A row that one block takes in the parts in which a cluster would divide it.
    (
        "cuda/block_reduce.cuh",
        "if (lane == 0) of_warp[share][warp] = value;",
        "if (lane == 0) of_warp[0][warp] = value;",
    ),
    ("cuda/block_reduce.cuh", "lane < warps ? of_warp[share][lane]", "lane < warps ? of_warp[0][lane]"),
    ("cuda/block_reduce.cuh", "lane < shares ? of_warp[lane][0]", "lane < 2 ? of_warp[lane][0]"),
    ("cuda/block_reduce.cuh", "if (lane == 0) of_warp[share][0] = value;", ""),
    ("cuda/loss.cu", "std::max(blocks_with_row_on_chip(launch, logits, kLoop), 1)", "1"),
    ("cuda/loss.cu", "rows.vocab_size, rank, divided", "rows.vocab_size, 0, divided"),
    ("cuda/loss_and_gradient.cu", "in_cache{1, threads_for(rows.vocab_size),", "in_cache{1, kLongRowThreads,"),
    ("cuda/rows.cuh", "if (!of_class) row.centred += z[i][k] - centre;", ""),
    ("cuda/loss.cu", "!counted || !rows.in_vocabulary(target)", "!counted"),
    ("cuda/loss.cu", "!counted || !rows.in_vocabulary(target)", "!rows.in_vocabulary(target)"),
    ("cuda/rows.cuh", "target >= 0 && target < vocab_size", "target < vocab_size"),
    ("cuda/rows.cuh", "target >= 0 && target < vocab_size", "target >= 0"),
    ("cuda/reduce_rows.cuh", "rows.targets[i] != rows.ignore_index,", "true,"),
    ("cuda/reduce_rows.cuh", "to.loss[i] = row.counted ?", "to.loss[i] = true ?"),
    ("cuda/reduce_rows.cuh", "target != rows.ignore_index, weight", "true, weight"),
    ("cuda/reduce_rows.cuh", "rows.in_vocabulary(target) ? rows.token_weights", "true ? rows.token_weights"),
    ("cuda/reduce_rows.cuh", "row.token_weight, row.row_weight);", "row.token_weight, 1.0);"),
    ("cuda/rows.cuh", "row_weight != nullptr ? row_weight[i] : A(1)", "A(1)"),
    ("cuda/reduce_rows.cuh", "row.token_weight, row.row_weight, row.ce", "row.token_weight, 1.0, row.ce"),
    ("cuda/loss.cu", "int(id - first_id)", "int(id)"),
    ("cuda/loss.cu", ".wants_shared = keeps_rows_on_chip(launch, logits)", ".wants_shared = false"),
    ("cuda/loss.cu", ".threads = kReduceThreads, .wants_shared = true", ".threads = kReduceThreads"),
    ("cuda/loss_and_gradient.cu", ".wants_shared = keeps_rows_on_chip(launch, gradient)", ".wants_shared = false"),
    ("cuda/loss.cu", "inputs, saved_rows, shard.vocab_size", "inputs, saved_rows, logits.size(1)"),
    ("row_loss.h", "reciprocal_or_zero(double(normalizer[1]))", "reciprocal_or_zero(double(normalizer[0]))"),
    ("cuda/loss.cu", "gradient_row(rows.saved(i), rows.row_weight_at(i)", "gradient_row(rows.saved(i), A(1)"),
    ("cuda/loss_and_gradient.cu", "gradient_row(saved, row_weight", "gradient_row(saved, A(1)"),
    ("row_loss.h", "(w * row_weight)", "row_weight"),
    ("targets.h", "is_int32 ? static_cast", "false ? static_cast"),
    ("cuda/reduce_rows.cuh", "first += kRowsAtOnce *", "first += 2 * kRowsAtOnce *"),
    ("cuda/loss.cu", "if (id == rows.ignore_index) {", "if (false) {"),
    ("cuda/rows.cuh", "if (is_mine) logit = x[target];", "if (is_mine) logit = x[target + 1];"),
    ("cuda/rows.cuh", "if (!is_mine) return;", "return;"),
    ("cuda/rows.cuh", "aligned ? range.visits(target", "true ? range.visits(target"),
    (
        "cuda/vector_access.cuh",
        "unsigned(j - begin) / kVector<T> % blockDim.x == threadIdx.x",
        "unsigned(j - begin) / kVector<T> % blockDim.x + 1 == threadIdx.x",
    ),
    ("cuda/vector_access.cuh", "return j == int(threadIdx.x);", "return false;"),
    ("cuda/vector_access.cuh", "return j - row_end == int(threadIdx.x);", "return false;"),
    ("cuda/vector_access.cuh", "!has_outside || j < 0 || j >= size", "j < 0 || j >= size"),
    ("cuda/rows.cuh", "g * rows.transform.derivative(x)", "g"),
    (
        "cuda/rows.cuh",
        "j < range.end; j += blockDim.x) element(j);",
        "j < range.end - 1; j += blockDim.x) element(j);",
    ),
    ("cuda/loss.cu", "grad_loss->stride(0) : 0", "1 : 0"),
    ("cuda/loss.cu", "inputs.options.reduction == Reduction::none && grad_loss ? grad_loss->stride(0) : 0", "0"),
    ("cuda/loss.cu", "upstream != nullptr ? upstream[i * upstream_stride] : factors.upstream", "factors.upstream"),
    ("cuda/loss.cu", "if (same_bits(factors.upstream, *upstream)) return;", "return;"),
    ("cuda/loss.cu", "*expected = *upstream;", ";"),
    ("cuda/loss_and_gradient.cu", "expected.upstream, expected", "A(1), expected"),
    ("cuda/reduce_rows.cuh", "if (to.upstream != nullptr) stored.upstream = *to.upstream;", ""),
    ("cuda/reduce_rows.cuh", "if (upstream != nullptr) found.upstream = *upstream;", ""),
    ("row_loss.h", "ratio - b_smoothed * class_weight", "ratio + b_smoothed * class_weight"),
    ("row_loss.h", "a_largest * e - b_target", "a_largest * e + b_target"),
    ("row_loss.h", "+ rest * (e / sum)", "+ rest"),
    ("row_loss.h", "e > A(0.5) * sum", "false"),
    ("row_loss.h", "row.max == -infinity<A>() ? not_a_number<A>() : canonical(of_lse)", "canonical(of_lse)"),
    ("portable.h", "return fmaf(e, fmaf(x * kLog2E, -0.693147180559945309f, x), e);", "return e;"),
    ("portable.h", "x = fmaxf(x, -200.0f);", ""),
    ("row_loss.h", "row.a_largest * exp2_approximate(-residual)", "row.a_largest"),
    ("row_loss.h", "fabsf(row.max) <= kNear ? kLog2E : 1.0f", "kLog2E"),
    ("cuda/device.cuh", "word & 0xffff0000u", "word"),
    ("cuda/device.cuh", "std::bit_cast<float>(word << 16)", "std::bit_cast<float>(word << 15)"),
    ("row_loss.h", "uint32_t(b.argmax) < uint32_t(a.argmax)", "false"),
    ("cuda/histogram.cu", "const bool present = first + lane < n;", "const bool present = true;"),
    ("cuda/histogram.cu", "first < n; first += stride", "first + kWarp <= n; first += stride"),
    ("cuda/histogram.cu", "counted && lane == __ffs(equal) - 1", "counted"),
    ("cuda/histogram.cu", "int64_t(__popc(equal))", "int64_t(1)"),
    ("cuda/histogram.cu", "present && !is_ignored && id < vocabulary.size", "present && !is_ignored"),
    (
        "cuda/histogram.cu",
        "counted ? static_cast<unsigned long long>(id) : ~0ull",
        "static_cast<unsigned long long>(id)",
    ),
    ("cuda/histogram.cu", "present && vocabulary.is_ignored(id)", "vocabulary.is_ignored(id)"),
    ("cuda/histogram.cu", "std::in_range<T>(ignore_index)", "true"),
    ("cuda/histogram.cu", "min(Word(token) - first_id, no_counter)", "Word(token) - first_id"),
    ("cuda/histogram.cu", "const Word no_counter = on_chip +", "const Word no_counter = on_chip - 1 +"),
    ("cuda/histogram.cu", "(on_chip + kSpareCounters) * sizeof", "on_chip * sizeof"),
    ("cuda/histogram.cu", "if (id < counted_by_group) return;", "if (id <= counted_by_group) return;"),
    (
        "cuda/histogram.cu",
        "Word(batch[i].value[k]) < counted_by_group;",
        "Word(batch[i].value[k]) <= counted_by_group;",
    ),
    ("cuda/histogram.cu", "min(counted_by_block, counted_by_group - first_id)", "counted_by_block"),
    ("cuda/histogram.cu", "if (member == 0) count_beyond(token);", "count_beyond(token);"),
    ("cuda/histogram.cu", "if (group == 0) {", "{"),
    ("cuda/histogram.cu", "all_counted || turns_until_mine > 0", "all_counted"),
    ("cuda/histogram.cu", "uint32_t turns_until_mine = member;", "uint32_t turns_until_mine = 0;"),
    ("cuda/histogram.cu", "turns_until_mine == 0 ? group_size - 1", "turns_until_mine == 0 ? group_size"),
    ("cuda/histogram.cu", "group) / group * group;", "group);"),
    ("cuda/histogram.cu", "std::min(possible, group * on_chip)", "group * on_chip"),
    ("cuda/histogram.cu", "id_of_run < vocabulary.size", "true"),
    ("cuda/histogram.cu", "ignored += length_of_run;", ""),
    (
        "cuda/histogram.cu",
        "blockIdx.x == 0 && threadIdx.x == 0) atomic_add(totals.seen",
        "threadIdx.x == 0) atomic_add(totals.seen",
    ),
    ("cuda/histogram.cu", "if (int(threadIdx.x) < head) count", "if (false) count"),
    ("cuda/histogram.cu", "if (threadIdx.x < n - tail) count", "if (false) count"),
    ("cuda/histogram.cu", "if (pack < packs) batch", "batch"),
    ("cuda/histogram.cu", "if (first + i * blockDim.x >= packs) break;", ""),
    ("cuda/histogram.cu", "vocabulary.is_ignored(id) ? totals.ignored : totals.counts + id", "totals.counts + id"),
    ("cuda/histogram.cu", "  end_run();\n  add_rejected", "  add_rejected"),
    ("cuda/device.cuh", "return __float2bfloat16_rn(x);", "return __float2bfloat16_rn(x * 0.998f);"),
    ("cuda/device.cuh", "return __float2half_rn(x);", "return __float2half_rn(x * 0.9997f);"),
    ("cuda/loss.cu", "rows.logits + i * rows.stride", "rows.logits + int(i * rows.stride)"),
    ("cuda/loss.cu", "gradients + i * gradient_stride", "gradients + int(i * gradient_stride)"),
    ("cuda/loss_and_gradient.cu", "rows.logits + i * rows.stride", "rows.logits + int(i * rows.stride)"),
    ("cuda/loss_and_gradient.cu", "gradients + i * gradient_stride", "gradients + int(i * gradient_stride)"),
    ("cuda/loss_and_gradient.cu", "gradients + i * stride", "gradients + int(i * stride)"),
    ("row_loss.h", "row[5 * rows] = token_weight;", "row[6 * rows] = token_weight;"),
    ("row_loss.h", "row[6 * rows] = modulation;", ""),
    ("row_loss.h", "modulation == A(0) ? A(0) : modulation * ce", "modulation * ce"),
    ("row_loss.h", "modulation == A(0) ? A(0) : modulation * ce", "ce"),
    ("row_loss.h", "m = row.modulation;", ""),
    ("row_loss.h", "of_lse += of_modulation;", ""),
    ("row_loss.h", "canonical(of_target + of_modulation)", "canonical(of_target)"),
    ("row_loss.h", "slope == A(0) ? A(0) : weighted * (slope * row.ce)", "weighted * (slope * row.ce)"),
    ("modulation.h", "nll < A(0) ? A(0) : nll", "nll"),
    ("modulation.h", "options.modulation_scale * p", "p"),
    ("modulation.h", "options.modulation_detach || ", ""),
    ("modulation.h", "-expm1(-least)", "(1 - p)"),
    ("modulation.h", "options.gamma == A(1) ? p : ", ""),
    ("modulation.h", "q == A(0) ? A(0) : options.gamma", "options.gamma"),
    ("cuda/reduce_rows.cuh", "k * threads < count) use", "k * threads < count - (count % 32 == 0)) use"),
    ("cuda/reduce_rows.cuh", "min(first + k * threads, count - 1)", "first"),
    ("cuda/reduce_rows.cuh", "reduction != Reduction::sum && normalizer == nullptr", "reduction == Reduction::mean"),
    # The shares of a row, and what a cluster keeps of one.
    ("cuda/vector_access.cuh", "packs + shares - 1", "packs"),
    ("cuda/vector_access.cuh", "packs + cluster.blocks - 1", "packs"),
    ("cuda/vector_access.cuh", "min(packs, (share + 1) * most)", "(share + 1) * most"),
    ("cuda/vector_access.cuh", "if (!has_outside) return;", ""),
    ("cuda/vector_access.cuh", "has_outside(share == 0)", "has_outside(share == 1)"),
    ("cuda/cluster.cuh", "    cluster.arrive();\n    cluster.wait();\n", ""),
    ("cuda/loss_and_gradient.cu", "i < rows.count; i += gridDim.x", "i < gridDim.x; i += gridDim.x"),
    ("cuda/launch.cuh", "built_for >= kHopper && ", ""),
    ("cuda/loss_and_gradient.cu", "wait_for_copies(--groups);", "--groups;"),
    ("cuda/loss_and_gradient.cu", "wait_for_copies(--groups);", "wait_for_copies(groups--);"),
    ("cuda/loss_and_gradient.cu", "p + (kPacks<T> - 1) * stride < packs", "p < packs"),
    ("cuda/loss_and_gradient.cu", "for (; p < packs; p += stride)", "if (p < packs)"),
    ("cuda/loss_and_gradient.cu", "return groups + 1;", "return groups + 2;"),
    ("cuda/loss_and_gradient.cu", "    from += range.step();\n", ""),
    ("cuda/loss_and_gradient.cu", "    first += range.step();\n", ""),
    ("cuda/cluster.cuh", "int(threadIdx.x) < cluster.blocks ?", "int(threadIdx.x) < 2 ?"),
    ("cuda/cluster.cuh", "cluster.of_rank(&of_block, threadIdx.x)", "cluster.of_rank(&of_block, 0)"),
    ("cuda/loss_and_gradient.cu", "(packs + blocks - 1) / blocks * kVectorBytes", "packs / blocks * kVectorBytes"),
    (
        "cuda/loss_and_gradient.cu",
        "if (rank == 0 && threadIdx.x == 0) {\n      write_row(",
        "if (rank == 1 && threadIdx.x == 0) {\n      write_row(",
    ),
    ("cuda/loss_and_gradient.cu", "if (equally_aligned<T>(x, gradient)) {", "if (true) {"),
    ("cuda/loss_and_gradient.cu", "i < rows.count; i += clusters", "i < rows.count - 1; i += clusters"),
    ("cuda/loss_and_gradient.cu", "i < count; i += gridDim.x", "i < 32; i += gridDim.x"),
    ("cuda/loss_and_gradient.cu", "if (by == Accumulator<T>(1)) return;", "return;"),
    ("cuda/loss_and_gradient.cu", "widen(row[j]) * by", "widen(row[j])"),
    ("cuda/loss_and_gradient.cu", "x + range.first_of_thread();", "x + int(threadIdx.x) * kVector<T>;"),
    ("cuda/weights.cu", "kWords = 2 * (kMaxBlocks + 1) + 2 * kMaxBlocks;", "kWords = kMaxBlocks;"),
    ("cuda/weights.cu", "sums = sums + law.sums_of(count, is_fixed(fixed, t));", "sums.total += count;"),
    ("cuda/loss.cu", "if (between > 0 && rows > 1)", "if (false)"),
    ("token_weights.h", "scale.of_frequency = exp(-unit);", "scale.of_frequency = 1.0;"),
    ("token_weights.h", "is_empty ? CountSums::kMost : sums.rareness", "sums.rareness"),
    ("token_weights.h", "mixed > double(kLargest) ? kLargest : float(mixed)", "float(mixed)"),
    ("cuda/weights.cu", "t < vocab_size; t += 2 * stride", "t < vocab_size - 1; t += 2 * stride"),
    ("cuda/weights.cu", "min(t + stride, vocab_size - 1)", "t"),
    ("cuda/weights.cu", "i < int(gridDim.x); i += blockDim.x", "i < int(gridDim.x) - 1; i += blockDim.x"),
    ("cuda/weights.cu", "is_fixed(fixed, t) ? 0.0 : ", ""),
    ("cuda/weights.cu", "blend != nullptr ? double(*blend) : 1.0", "1.0"),
    # The entropy of a row, and the mean of a modulation.
    ("row_loss.h", "return below < least ? least : below;", "return below;"),
    ("row_loss.h", "row.scaled + above * row.sum", "row.scaled"),
    ("row_loss.h", "scaled_relative_to(a, shift) + scaled_relative_to(b, shift)", "scaled_relative_to(a, shift)"),
    ("cuda/rows.cuh", "if constexpr (kLoop != Loop::plain) row.scaled = scaled_relative_to(row, shift);", ""),
    ("loss_arguments.h", "stats || needs_entropy(options.modulation) ? Loop::entropy", "stats ? Loop::entropy"),
    ("modulation.h", "entropy / A(log(A(options.vocab_size)))", "entropy"),
    ("modulation.h", "entropy == A(0) ? A(0) : entropy", "entropy"),
    ("row_loss.h", "factors.weighted /= factors.modulation;", ""),
    ("row_loss.h", "normalize && sums.rows > 0", "normalize"),
    ("cuda/reduce_rows.cuh", "to.reduction != Reduction::none || normalize", "to.reduction != Reduction::none"),
    ("cuda/reduce_rows.cuh", "row.row_weight * weighted", "row.row_weight"),
    ("cuda/reduce_rows.cuh", "if (row.counted) sums.add(", "sums.add("),
    ("cuda/loss_and_gradient.cu", "if (inputs.options.modulation_normalize) {", "if (false) {"),
    # Token weights of rows, and label smoothing by each class's own.
    ("loss_arguments.h", "of_rows ? i : target", "target"),
    ("cuda/rows.cuh", "element.class_weight = rows.class_weights.at(j);", "element.class_weight = A(1);"),
    ("cuda/rows.cuh", "row.class_weight += weight;", ""),
    ("cuda/rows.cuh", "ClassWeights<A>::times(weight, z[i][k] - centre)", "weight * (z[i][k] - centre)"),
    (
        "cuda/rows.cuh",
        "row.off_target(rows.transform.apply(x, j), rows.class_weights.at(j))",
        "row.off_target(rows.transform.apply(x, j))",
    ),
    ("row_loss.h", "weight == A(0) ? A(0) : weight * difference", "weight * difference"),
    ("row_loss.h", "(s * row.smoothing_weight)", "s"),
    ("row_loss.h", "SmoothingWeight::none ? of_class : of_class * w", "SmoothingWeight::none ? of_class : of_class"),
]


# The same for lines of variants only, with the macro that selects the variant.
MESSAGES, BATCHES = "-DPDL_EXCHANGE=messages", "-DPDL_HISTOGRAM_BATCHES=2"
LAST_BLOCK, FEW_BLOCKS = "-DPDL_REDUCED_BY=last_block", "-DPDL_MOST_BLOCKS=3"
VARIANT_MUTATIONS = [
    (MESSAGES, "cuda/cluster.cuh", "uint32_t(cluster.blocks * sizeof(Message))", "uint32_t(sizeof(Message))"),
    (
        MESSAGES,
        "cuda/cluster.cuh",
        "    cluster.wait();\n    if (threadIdx.x >= kWarp)",
        "    if (threadIdx.x >= kWarp)",
    ),
    (MESSAGES, "cuda/cluster.cuh", "->of_block[cluster.rank()];", "->of_block[0];"),
    (
        MESSAGES,
        "cuda/cluster.cuh",
        "while (!ptx::mbarrier_try_wait_parity",
        "while (false && !ptx::mbarrier_try_wait_parity",
    ),
    (MESSAGES, "cuda/cluster.cuh", "k < kWords; k += 4", "k < 4; k += 4"),
    (MESSAGES, "cuda/cluster.cuh", "of_block[lane].words, sizeof value", "of_block[0].words, sizeof value"),
    (FEW_BLOCKS, "cuda/block_reduce.cuh", "if (share == 0) __syncthreads();", ""),
    (FEW_BLOCKS, "cuda/loss.cu", "i < rows.count; i += gridDim.x", "i < gridDim.x; i += gridDim.x"),
    (BATCHES, "cuda/histogram.cu", "ahead < kBatches - 1; ++ahead) load", "ahead < 0; ++ahead) load"),
    (BATCHES, "cuda/histogram.cu", "first + (kBatches - 1) * stride);", "first + stride * kBatches);"),
    (
        BATCHES,
        "cuda/histogram.cu",
        "batches[ahead - 1][i] = batches[ahead][i];",
        "batches[ahead - 1][i] = batches[0][i];",
    ),
    (LAST_BLOCK, "cuda/reduce_rows.cuh", "rows_before == uint32_t(rows.count - 1)", "blockIdx.x == gridDim.x - 1"),
    (LAST_BLOCK, "cuda/reduce_rows.cuh", "if (__syncthreads_or(is_last) == 0) return;", "if (!is_last) return;"),
    (LAST_BLOCK, "cuda/reduce_rows.cuh", "  reducer.clear();\n", ""),
    (LAST_BLOCK, "cuda/reduce_rows.cuh", "rows.count, thread, kReduceThreads, load", "rows.count, thread, 256, load"),
    (LAST_BLOCK, "cuda/reduce_rows.cuh", "return rows > 0 && rows <= int64_t(~0u);", "return true;"),
    (LAST_BLOCK, "cuda/block_reduce.cuh", "of_warp[thread / kWarp] = sum;", "of_warp[threadIdx.x / kWarp] = sum;"),
    (
        LAST_BLOCK,
        "cuda/block_reduce.cuh",
        "thread < threads; thread += blockDim.x",
        "thread < int(blockDim.x); thread += blockDim.x",
    ),
    (
        LAST_BLOCK,
        "cuda/block_reduce.cuh",
        "of_warp[thread / kWarp] = sum;\n  }\n  __syncthreads();",
        "of_warp[thread / kWarp] = sum;\n  }",
    ),
    (LAST_BLOCK, "cuda/loss.cu", "if (rows.count > 0) launch.zero(", "if (false) launch.zero("),
    (
        LAST_BLOCK,
        "cuda/loss.cu",
        "threads_for(rows.vocab_size), Reducer<T>::kSharedBytes}",
        "threads_for(rows.vocab_size)}",
    ),
    (
        LAST_BLOCK,
        "cuda/loss_and_gradient.cu",
        "std::max(int(bytes), Reducer<T>::kSharedBytes)",
        "int(bytes)",
    ),
    (
        LAST_BLOCK,
        "cuda/loss_and_gradient.cu",
        "Grid in_cache{1, threads_for(rows.vocab_size), Reducer<T>::kSharedBytes};",
        "Grid in_cache{1, threads_for(rows.vocab_size)};",
    ),
    (LAST_BLOCK, "cuda/loss.cu", "        rows_before = reducer.row_written(rows.count);\n", ""),
    (LAST_BLOCK, "cuda/loss_and_gradient.cu", "        rows_before = reducer.row_written(rows.count);\n", ""),
    (
        LAST_BLOCK,
        "cuda/loss_and_gradient.cu",
        "      if (rank == 0 && threadIdx.x == 0) rows_before = reducer.row_written(rows.count);\n",
        "",
    ),
    (
        LAST_BLOCK,
        "cuda/loss_and_gradient.cu",
        "      write_row(rows, i, of_row.saved, of_row.argmax);\n      rows_before = reducer.row_written(rows.count);",
        "      rows_before = reducer.row_written(rows.count);\n      write_row(rows, i, of_row.saved, of_row.argmax);",
    ),
    (
        LAST_BLOCK,
        "cuda/loss.cu",
        "write_row(rows, i, rows.loss_of(row, z_target, of_target.token_weight), argmax_of(row));\n      rows_before = "
        "reducer.row_written(rows.count);",
        "rows_before = reducer.row_written(rows.count);\n      "
        "write_row(rows, i, rows.loss_of(row, z_target, of_target.token_weight), argmax_of(row));",
    ),
]


class Mutant(NamedTuple):
    """A broken copy of a file, and the macros under which the break shows."""

    name: str
    file: str
    text: str
    flags: str = ""


def mutants(csrc: Path) -> list[Mutant]:
    """All of them."""
    found = []
    for path in sorted((csrc / "cuda").iterdir()):
        text = path.read_text()
        for number, match in enumerate(re.finditer(r"^ *__syncthreads\(\);", text, re.MULTILINE), 1):
            name = f"cuda/{path.name}: barrier {number} removed"
            found.append(Mutant(name, f"cuda/{path.name}", text[: match.start()] + text[match.end() :]))
    for flags, file, before, after in [*(("", *mutation) for mutation in MUTATIONS), *VARIANT_MUTATIONS]:
        text = (csrc / file).read_text()
        if before not in text:
            sys.exit(f"{file} no longer holds `{before}`: bring the list of mutations up to date")
        parts = text.split(before)
        for place in range(1, len(parts)):
            name = f"{file}: {before} -> {after}" + (f" ({place} of {len(parts) - 1})" if len(parts) > 2 else "")
            broken = before.join(parts[:place]) + after + before.join(parts[place:])
            found.append(Mutant(f"{name} {flags}".rstrip(), file, broken, flags))
    return found


def survives(csrc: Path, mutant: Mutant) -> tuple[bool, str, float]:
    """Whether all tests pass with the mutant, the first that does not or pytest's last line, and the seconds taken."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "csrc"
        shutil.copytree(csrc, copy)
        (copy / mutant.file).write_text(mutant.text)
        environment = {"PDL_EXT_EMULATOR_SOURCES": str(copy), "PDL_EXT_EMULATOR_FLAGS": mutant.flags}
        try:
            done = emulated_tests.run(900, stop_at_first=True, **environment)
        except subprocess.TimeoutExpired:
            return False, "hangs", time.monotonic() - start
    if done.returncode < 0:
        return False, f"the tests die of signal {-done.returncode}", time.monotonic() - start
    lines = done.stdout.splitlines()
    failed = [line for line in lines if line.startswith("FAILED")]
    # This proves nothing: it does not compile, or pytest itself failed.
    if done.returncode != 0 and not failed:
        raise RuntimeError(f"no test failed, and yet:\n{done.stdout[-3000:]}{done.stderr[-1000:]}")
    return done.returncode == 0, (failed or lines[-1:])[0], time.monotonic() - start


def main(words: list[str]) -> int:
    csrc = emulated_tests.ROOT / "csrc"
    chosen = [mutant for mutant in mutants(csrc) if not words or any(word in mutant.name for word in words)]
    # Without a mutation they have to pass, or every mutant would seem to be seen.
    whole = (csrc / "cuda" / "loss.cu").read_text()
    for flags in sorted({mutant.flags for mutant in chosen}):
        if not survives(csrc, Mutant("none", "cuda/loss.cu", whole, flags))[0]:
            sys.exit(f"the tests fail without any mutation {flags}")
    survivors = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda mutant: survives(csrc, mutant), chosen)
        for mutant, (survived, by, seconds) in zip(chosen, results, strict=True):
            survivors += survived
            print(f"{'SURVIVED' if survived else 'killed':8} {seconds:4.0f} s  {mutant.name}\n{'':17}{by}", flush=True)
    print(f"{len(chosen)} mutants, {survivors} survived")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
