// Sequences whose lengths or places differ: packed, with used lengths, in pages.
#pragma once

#include "../describe.h"

namespace fused_attention {

// Describes and checks the batch, lengths and places. Whatever the tensors of lengths and pages
// hold, nothing is read out of bounds from here on.
void describe_sequences(AttentionParams& p, const Options& o, const Shape& key, Held& held);

// Sq and Sk <- those of the longest sequence.
void shorten_to_longest(AttentionParams& p);

}  // namespace fused_attention
