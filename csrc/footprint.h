// The memory that the elements of a tensor occupy, and whether two tensors share some of it. The
// answer is exact for everything that slicing, transposing and expanding makes of dense tensors;
// otherwise it is on the safe side.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <algorithm>
#include <utility>
#include <vector>

namespace fused_attention {

class Footprint {
 public:
  // `data` is the address of the first element, `width` its bytes; strides are in elements.
  Footprint(const void* data, int64_t width, const int64_t* sizes, const int64_t* strides,
            size_t dims)
      : begin_((uintptr_t)data), width_(width) {
    for (size_t i = 0; i < dims; ++i) empty_ |= sizes[i] == 0;
    for (size_t i = 0; i < dims && !empty_; ++i) {
      if (sizes[i] == 1) continue;
      expanded_ |= strides[i] == 0;
      if (strides[i] != 0) steps_.push_back({strides[i] * width, 0, sizes[i] - 1});
    }
    std::sort(steps_.begin(), steps_.end(), falls);
  }

  // Whether two elements lie in one place.
  bool overlaps_itself() const {
    std::vector<Steps> steps = steps_;
    bool repeated = expanded_;
    for (size_t i = 0; i < steps.size(); ++i) {
      repeated |= i > 0 && steps[i - 1].stride == steps[i].stride;
      steps[i].low = -steps[i].high;
    }
    int budget = kBudget;
    return repeated || reaches(steps.data(), (int)steps.size(), 0, false, budget);
  }

  // Whether an element of one shares a byte with an element of the other.
  bool overlaps(const Footprint& other) const {
    if (empty_ || other.empty_) return false;
    std::vector<Steps> steps = steps_;
    for (const Steps& step : other.steps_) steps.push_back({step.stride, -step.high, 0});
    steps.push_back({1, 1 - other.width_, width_ - 1});  // the bytes of an element
    std::sort(steps.begin(), steps.end(), falls);
    size_t count = 0;  // the number of different strides
    for (const Steps& step : steps) {
      if (count > 0 && steps[count - 1].stride == step.stride) {
        steps[count - 1].low += step.low, steps[count - 1].high += step.high;
      } else {
        steps[count++] = step;
      }
    }
    int budget = kBudget;
    return reaches(steps.data(), (int)count, (int64_t)(other.begin_ - begin_), true, budget);
  }

 private:
  // A dimension allows n steps of `stride` bytes each, for low <= n <= high.
  struct Steps {
    int64_t stride, low, high;
  };
  static bool falls(const Steps& a, const Steps& b) { return a.stride > b.stride; }

  // Whether some numbers of steps, not all of them 0 unless `moved`, lead to `distance`. The
  // strides fall. If one is longer than the distance that the smaller ones reach together, as in a
  // slice of a dense tensor, at most two numbers of its steps are tried. A search beyond its budget
  // counts as found.
  static constexpr int kBudget = 1 << 16;
  static bool reaches(const Steps* steps, int count, int64_t distance, bool moved, int& budget) {
    if (--budget < 0) return true;
    if (count == 0) return distance == 0 && moved;
    int64_t below = 0, above = 0;  // how far the smaller strides reach
    for (int i = 1; i < count; ++i) {
      below += steps[i].low * steps[i].stride;
      above += steps[i].high * steps[i].stride;
    }
    for (int64_t n = steps->low; n <= steps->high; ++n) {
      int64_t rest = distance - n * steps->stride;
      if (rest > above) {  // too far away yet: leap
        n += (rest - above - 1) / steps->stride;
        continue;
      }
      if (rest < below) break;
      if (reaches(steps + 1, count - 1, rest, moved || n != 0, budget)) return true;
    }
    return false;
  }

  uintptr_t begin_;
  int64_t width_;
  bool empty_ = false, expanded_ = false;
  std::vector<Steps> steps_;
};

}  // namespace fused_attention
