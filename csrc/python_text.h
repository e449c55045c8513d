// The text of a str, as UTF-8, without the copy of it that Python would keep inside the str.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <string_view>

#include "utf8.h"

namespace py = pybind11;

namespace fastgpt {

// A str has no UTF-8. Raised where Python may not be asked for its own error; see Text::refuse().
struct LoneSurrogate {};

class Text {
 public:
  explicit Text(std::string_view utf8) : utf8_(utf8) {}
  // A str or bytes, which must outlive this.
  explicit Text(py::handle object) {
    if (PyBytes_Check(object.ptr())) {
      utf8_ = {PyBytes_AS_STRING(object.ptr()),
               static_cast<std::size_t>(PyBytes_GET_SIZE(object.ptr()))};
      return;
    }
    if (!PyUnicode_Check(object.ptr())) {
      throw py::type_error(std::string("text must be str, not ") + Py_TYPE(object.ptr())->tp_name);
    }
#if PY_VERSION_HEX < 0x030C0000
    if (PyUnicode_READY(object.ptr()) != 0) throw py::error_already_set();
#endif
    const auto* const compact = reinterpret_cast<PyCompactUnicodeObject*>(object.ptr());
    const auto length = static_cast<std::size_t>(PyUnicode_GET_LENGTH(object.ptr()));
    if (PyUnicode_IS_ASCII(object.ptr())) {
      utf8_ = {static_cast<const char*>(PyUnicode_DATA(object.ptr())), length};
    } else if (compact->utf8) {
      utf8_ = {compact->utf8, static_cast<std::size_t>(compact->utf8_length)};
    } else {
      characters_ = PyUnicode_DATA(object.ptr());
      length_ = length;
      width_ = static_cast<int>(PyUnicode_KIND(object.ptr()));
    }
  }

  // Bytes in UTF-8, or in the str if it has no UTF-8 yet: near enough to share out work.
  std::size_t size() const {
    return characters_ ? length_ * static_cast<std::size_t>(width_) : utf8_.size();
  }

  // Written to `space` if need be, and there until that is used again. Needs no GIL. Throws
  // LoneSurrogate.
  std::string_view utf8(ByteBuffer& space) const {
    if (!characters_) return utf8_;
    space.clear();
    const bool valid =
        width_ == 1   ? append_utf8(static_cast<const std::uint8_t*>(characters_), length_, space)
        : width_ == 2 ? append_utf8(static_cast<const std::uint16_t*>(characters_), length_, space)
                      : append_utf8(static_cast<const std::uint32_t*>(characters_), length_, space);
    if (!valid) throw LoneSurrogate();
    return {space.data(), space.size()};
  }

  // Throws Python's UnicodeEncodeError for a str with a lone surrogate.
  static void refuse(py::handle object) {
    if (PyUnicode_Check(object.ptr()) && !PyUnicode_AsUTF8AndSize(object.ptr(), nullptr)) {
      throw py::error_already_set();
    }
  }

 private:
  std::string_view utf8_;
  const void* characters_ = nullptr;  // nullptr: utf8_ is all of the text
  std::size_t length_ = 0;
  int width_ = 0;  // bytes of a character
};

}  // namespace fastgpt
