// Encodes many texts by several threads.
#pragma once

#include <cstddef>
#include <utility>
#include <vector>

#include "encoder.h"
#include "id_array.h"
#include "parallel.h"

namespace fastgpt {

// The ids of a thread lie one behind the other, in memory that the next batch uses again, so that
// each id is written to fresh memory once only: in what the caller makes of it.
class BatchEncoder {
 public:
  // The ids of one text: `count` of them in the array from place `begin` on.
  struct Part {
    const IdArray* array;
    std::size_t begin;
    std::size_t count;
  };

  // One thread for each state; narrow as in IdArray. The encoder must outlive this.
  BatchEncoder(const Encoder& encoder, std::vector<Encoder::State> states, bool narrow)
      : encoder_(encoder), states_(std::move(states)) {
    for (std::size_t i = 0; i < states_.size(); ++i) arrays_.emplace_back(narrow);
  }

  // Of a Text is needed utf8(ByteBuffer&), a string_view that holds until the buffer is used again.
  template <class Text>
  void encode(const Text* texts, std::size_t count) {
    for (IdArray& array : arrays_) array.clear();
    parts_.resize(count);
    parallel_for(count, static_cast<int>(states_.size()), [&](std::size_t i, int thread) {
      IdArray& array = arrays_[static_cast<std::size_t>(thread)];
      EncodeState& state = *states_[static_cast<std::size_t>(thread)];
      parts_[i] = {&array, array.size(), 0};
      encoder_.encode(texts[i].utf8(state.text), state, array);
      parts_[i].count = array.size() - parts_[i].begin;
    });
  }

  // By text of the last batch.
  const std::vector<Part>& parts() const { return parts_; }

 private:
  const Encoder& encoder_;
  std::vector<Encoder::State> states_;
  std::vector<IdArray> arrays_;
  std::vector<Part> parts_;
};

}  // namespace fastgpt
