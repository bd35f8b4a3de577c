// Notes, for `explain`, what a call runs and what memory that takes, as one JSON object per line:
// in a dry run, in which tensors are on "meta" and nothing is computed, or during a real call, if
// the thread listens. The operator itself takes the notes, at the places where it decides.
#pragma once

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>

#include <string>

namespace fused_attention {

struct Notes {
  bool dry = false;
  std::string text;
};
// The notes of this thread's calls; null if nobody asked.
inline thread_local Notes* notes = nullptr;
inline bool is_dry() { return notes != nullptr && notes->dry; }

__attribute__((format(printf, 1, 2))) inline void note(const char* format, ...) {
  if (notes == nullptr) return;
  char line[1024];
  va_list values;
  va_start(values, format);
  vsnprintf(line, sizeof(line), format, values);
  va_end(values);
  notes->text.append(line).append("\n");
}

inline void note_operator(const char* name) { note("{\"operator\": \"%s\"}", name); }

class DryRun {
 public:
  DryRun() : before_(notes) { notes = &own_; }
  ~DryRun() { notes = before_; }
  const std::string& text() const { return own_.text; }

 private:
  Notes own_ = {true, {}};
  Notes* before_;
};

}  // namespace fused_attention
