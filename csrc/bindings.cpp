// Python bindings of the BPE core; python_ids.h and python_text.h know of it too.
#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>

#include "batch_encoder.h"
#include "encoder.h"
#include "id_array.h"
#include "parallel.h"
#include "piece_finder.h"
#include "python_ids.h"
#include "python_text.h"
#include "rank_merges.h"
#include "span_encoder.h"
#include "trainer.h"
#include "unicode_ranges.h"
#include "word_counter.h"

namespace py = pybind11;

namespace fastgpt {
namespace {

Pattern parse_pattern(const std::string& name) {
  if (name == "gpt2") return Pattern::kGpt2;
  if (name == "gpt4") return Pattern::kGpt4;
  if (name == "llama3") return Pattern::kLlama3;
  if (name == "o200k") return Pattern::kO200k;
  throw std::invalid_argument("unknown pattern '" + name + "'; use gpt2, gpt4, llama3 or o200k");
}

// The UTF-8 bytes of a str, which lie inside it as long as it lives.
std::string_view utf8_view(py::handle text) {
  if (!PyUnicode_Check(text.ptr())) {
    throw py::type_error(std::string("text must be str, not ") + Py_TYPE(text.ptr())->tp_name);
  }
  Py_ssize_t size = 0;
  const char* data = PyUnicode_AsUTF8AndSize(text.ptr(), &size);
  if (!data) throw py::error_already_set();
  return {data, static_cast<std::size_t>(size)};
}

std::string_view bytes_view(const py::bytes& data) {
  return {PyBytes_AS_STRING(data.ptr()), static_cast<std::size_t>(PyBytes_GET_SIZE(data.ptr()))};
}

// str or bytes.
std::string_view text_view(py::handle text) {
  if (PyBytes_Check(text.ptr())) return bytes_view(py::reinterpret_borrow<py::bytes>(text));
  return utf8_view(text);
}

using Places = py::array_t<std::int64_t, py::array::c_style | py::array::forcecast>;

class PyEncoder {
 public:
  PyEncoder(const std::string& pattern, std::vector<std::optional<py::bytes>> tokens,
            const std::vector<std::tuple<std::uint32_t, std::uint32_t, std::uint32_t>>& merges,
            const std::vector<std::pair<py::bytes, std::uint32_t>>& specials, bool whole_pieces)
      : encoder_(make_vocabulary(pattern, tokens, merges, specials, whole_pieces)),
        narrow_(encoder_.vocab_size() <= 65536) {}

  py::list encode(py::handle text, const std::vector<std::size_t>& allowed) {
    const Encoder::State state = encoder_.acquire();
    const TokenBuffer& ids = run(Text(text), allowed, *state);
    if (!integers_) integers_ = std::make_unique<IntegerTable>(encoder_.vocab_size());
    return integers_->list(ids.data(), ids.size());
  }

  py::array encode_to_numpy(py::handle text, const std::vector<std::size_t>& allowed) {
    const Encoder::State state = encoder_.acquire();
    const Text wanted(text);
    if (!allowed.empty() || wanted.size() <= Encoder::kPart) {
      const TokenBuffer& ids = run(wanted, allowed, *state);
      return to_array(narrow_, ids.data(), ids.size());
    }
    IdArray ids(narrow_);
    {
      const py::gil_scoped_release release;
      encoder_.encode(wanted.utf8(state->text), *state, ids);
    }
    return to_array(ids);
  }

  py::array encode_parallel(py::handle text, int threads) {
    ByteBuffer space;
    std::string_view utf8;
    try {
      utf8 = Text(text).utf8(space);
    } catch (const LoneSurrogate&) {
      Text::refuse(text);
    }
    const std::vector<std::string_view> views = Encoder::parts(utf8);
    const std::vector<Text> parts(views.begin(), views.end());
    BatchEncoder batch(encoder_, acquire(threads, parts.size()), narrow_);
    {
      const py::gil_scoped_release release;
      batch.encode(parts.data(), parts.size());
    }
    std::size_t total = 0;
    for (const BatchEncoder::Part& part : batch.parts()) total += part.count;
    py::array out(id_dtype(narrow_), total);
    auto* place = static_cast<char*>(out.mutable_data());
    const py::gil_scoped_release release;
    for (const auto& [array, begin, count] : batch.parts()) {
      std::memcpy(place, array->at(begin), count * array->id_bytes());
      place += count * array->id_bytes();
    }
    return out;
  }

  py::list encode_batch(const py::sequence& texts, int threads) {
    // A fast sequence keeps every text alive whatever happens to the caller's list meanwhile.
    const py::tuple held(texts);
    const std::vector<Text> wanted(held.begin(), held.end());
    std::vector<Encoder::State> states = acquire(threads, wanted.size());
    // Some texts at a time: so few that the ids stay near, so many that they are worth a thread.
    const std::size_t most = states.size() << (states.size() == 1 ? 18 : 22);  // bytes
    BatchEncoder batch(encoder_, std::move(states), narrow_);
    py::list out(wanted.size());
    for (std::size_t begin = 0; begin < wanted.size();) {
      std::size_t end = begin;
      for (std::size_t bytes = 0; end < wanted.size() && bytes < most; ++end) {
        bytes += wanted[end].size();
      }
      try {
        const py::gil_scoped_release release;
        batch.encode(&wanted[begin], end - begin);
      } catch (const LoneSurrogate&) {
        for (const py::handle text : held) Text::refuse(text);
      }
      for (const auto& [array, first, count] : batch.parts()) {
        out[begin++] = to_array(*array, first, count);
      }
    }
    return out;
  }

  // The pieces of text end at `ends`; dropout 0 is none.
  py::array encode_spans(py::handle text, const Places& ends, double dropout, std::uint64_t seed) {
    const std::string_view view = text_view(text);
    if (!(dropout >= 0 && dropout <= 1)) {
      throw std::invalid_argument("the dropout probability is outside [0, 1]");
    }
    if (!spans_) spans_ = std::make_unique<SpanEncoder>(encoder_.vocabulary());
    const std::int64_t* const data = ends.data();
    const auto size = static_cast<std::size_t>(ends.size());
    TokenBuffer ids;
    {
      const py::gil_scoped_release release;
      Dropout draws(dropout, seed);
      spans_->encode(view, data, size, draws, ids);
    }
    return to_array(narrow_, ids.data(), ids.size());
  }

  py::bytes decode(py::handle ids) const {
    ByteBuffer bytes;
    decode_to(ids, bytes);
    return py::bytes(bytes.data(), bytes.size());
  }

  py::str decode_text(py::handle ids, const char* errors) const {
    ByteBuffer bytes;
    decode_to(ids, bytes);
    const auto size = static_cast<Py_ssize_t>(bytes.size());
    const auto text = py::reinterpret_steal<py::str>(
        PyUnicode_DecodeUTF8(size ? bytes.data() : "", size, errors));
    if (!text) throw py::error_already_set();
    return text;
  }

  std::size_t vocab_size() const { return encoder_.vocab_size(); }

 private:
  static Vocabulary make_vocabulary(
      const std::string& pattern, std::vector<std::optional<py::bytes>>& tokens,
      const std::vector<std::tuple<std::uint32_t, std::uint32_t, std::uint32_t>>& merges,
      const std::vector<std::pair<py::bytes, std::uint32_t>>& specials, bool whole_pieces) {
    Vocabulary vocabulary;
    vocabulary.pattern = parse_pattern(pattern);
    vocabulary.whole_pieces = whole_pieces;
    for (const auto& token : tokens) {
      vocabulary.tokens.emplace_back(token ? bytes_view(*token) : std::string_view());
    }
    for (const auto& [left, right, id] : merges) vocabulary.merges.push_back({left, right, id});
    for (const auto& [text, id] : specials) vocabulary.specials.emplace_back(bytes_view(text), id);
    return vocabulary;
  }

  // States for as many threads as are wanted, but no more than there is work for.
  std::vector<Encoder::State> acquire(int threads, std::size_t work) const {
    const auto wanted = std::min(static_cast<std::size_t>(resolve_threads(threads)), work);
    std::vector<Encoder::State> states;
    for (std::size_t i = 0; i < std::max<std::size_t>(wanted, 1); ++i) {
      states.push_back(encoder_.acquire());
    }
    return states;
  }

  // Encodes into the work space of the state. A state is taken and given back under the GIL, so
  // that no fork can meet a locked pool.
  const TokenBuffer& run(const Text& text, const std::vector<std::size_t>& allowed,
                         EncodeState& state) const {
    TokenBuffer& ids = state.ids;
    ids.clear();
    const auto encode = [&] {
      const std::string_view utf8 = text.utf8(state.text);
      if (allowed.empty()) return encoder_.encode(utf8, state, ids);
      encoder_.encode_with_specials(utf8, allowed, state, ids);
    };
    constexpr std::size_t kWorthARelease = 1024;
    if (text.size() < kWorthARelease) {
      encode();
    } else {
      const py::gil_scoped_release release;
      encode();
    }
    return ids;
  }

  void decode_to(py::handle ids, ByteBuffer& out) const {
    if (!py::isinstance<py::array>(ids)) return decode_sequence(ids, out);
    const auto array = py::reinterpret_borrow<py::array>(ids);
    const char kind = array.dtype().kind();
    if (array.ndim() != 1 || (kind != 'i' && kind != 'u')) {
      throw py::type_error("ids must be a one-dimensional array of integers");
    }
    if (kind == 'u' && array.itemsize() <= 2) return decode_as<std::uint16_t>(array, out);
    if (kind == 'u' && array.itemsize() == 4) return decode_as<std::uint32_t>(array, out);
    if (array.itemsize() <= 4) return decode_as<std::int32_t>(array, out);
    decode_as<std::int64_t>(array, out);
  }

  template <class Id>
  void decode_as(const py::array& ids, ByteBuffer& out) const {
    const auto typed = py::array_t<Id, py::array::c_style | py::array::forcecast>::ensure(ids);
    if (!typed) throw py::error_already_set();
    const Id* const data = typed.data();
    const auto count = static_cast<std::size_t>(typed.size());
    const py::gil_scoped_release release;
    out.room(count * kLikelyBytes);
    encoder_.decode(data, count, out);
  }

  static constexpr std::size_t kLikelyBytes = 4;  // of a token

  // Some ids at a time, so that they are decoded while they are near.
  void decode_sequence(py::handle ids, ByteBuffer& out) const {
    const auto items = py::reinterpret_steal<py::object>(
        PySequence_Fast(ids.ptr(), "ids must be a sequence of integers"));
    if (!items) throw py::error_already_set();
    out.room(static_cast<std::size_t>(PySequence_Fast_GET_SIZE(items.ptr())) * kLikelyBytes);
    constexpr std::size_t kStep = 1024;
    std::uint32_t step[kStep];
    std::size_t count = 0;
    std::size_t before = 0;
    const auto flush = [&] {
      encoder_.decode(step, count, out, before);
      before += count;
      count = 0;
    };
    // The size is read again each time: __index__ of an item may run code that shrinks the list.
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(items.ptr()); ++i) {
      PyObject* const item = PySequence_Fast_GET_ITEM(items.ptr(), i);
      if (!small_integer(item, &step[count])) {
        const std::int64_t value = any_integer(item);
        if (value < 0 || value > 0xFFFFFFFF) {
          flush();  // an id before this one may be wrong too
          encoder_.refuse(std::to_string(value), before);
        }
        step[count] = static_cast<std::uint32_t>(value);
      }
      if (++count == kStep) flush();
    }
    flush();
  }

  Encoder encoder_;
  std::unique_ptr<SpanEncoder> spans_;
  bool narrow_;
  std::unique_ptr<IntegerTable> integers_;
};

// A method that Python calls without the argument parsing of pybind11, which takes longer than the
// ids of a short text: (text, allowed) with the encoder in a capsule. The capsule keeps it alive.
template <auto kMethod>
PyObject* call_encoder(PyObject* capsule, PyObject* const* args, Py_ssize_t count) {
  try {
    if (count != 2) throw py::type_error("expected a text and the allowed special tokens");
    auto* const encoder = static_cast<PyEncoder*>(PyCapsule_GetPointer(capsule, nullptr));
    std::vector<std::size_t> allowed;
    if (!PyTuple_CheckExact(args[1]) || PyTuple_GET_SIZE(args[1]) > 0) {
      allowed = py::cast<std::vector<std::size_t>>(py::handle(args[1]));
    }
    return (encoder->*kMethod)(args[0], allowed).release().ptr();
  } catch (const LoneSurrogate&) {
    PyUnicode_AsUTF8AndSize(args[0], nullptr);  // sets the error
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

template <auto kMethod>
py::object bound_method(const py::object& self, const char* name) {
  static PyMethodDef definition{
      name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call_encoder<kMethod>)),
      METH_FASTCALL, "(text: str | bytes, allowed: Sequence[int])"};
  const auto capsule = py::reinterpret_steal<py::object>(PyCapsule_New(
      self.cast<PyEncoder*>(), nullptr,
      [](PyObject* held) { Py_DECREF(static_cast<PyObject*>(PyCapsule_GetContext(held))); }));
  if (!capsule) throw py::error_already_set();
  PyCapsule_SetContext(capsule.ptr(), self.inc_ref().ptr());
  return py::reinterpret_steal<py::object>(PyCFunction_New(&definition, capsule.ptr()));
}

class PyTrainer {
 public:
  PyTrainer(const std::string& pattern, int threads) : counter_(parse_pattern(pattern), threads) {}

  void feed(const py::sequence& texts) {
    const py::tuple held(texts);
    std::vector<std::string_view> views;
    views.reserve(held.size());
    for (const py::handle text : held) views.push_back(text_view(text));
    const py::gil_scoped_release release;
    counter_.add(views);
  }

  void feed_spans(py::handle text, const Places& ends) {
    const std::string_view view = text_view(text);
    const std::int64_t* const data = ends.data();
    const auto size = static_cast<std::size_t>(ends.size());
    const py::gil_scoped_release release;
    counter_.add_pieces(view, data, size);
  }

  std::vector<IdPair> train(std::size_t merges, std::uint64_t min_count,
                            const std::optional<py::function>& progress, std::size_t max_length,
                            std::vector<IdPair> first) {
    TrainOptions options;
    options.merges = merges;
    options.min_count = min_count;
    options.max_length = max_length;
    options.first = std::move(first);
    options.progress = [&](std::size_t done, std::size_t wanted) {
      const py::gil_scoped_acquire acquire;
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
      if (progress) (*progress)(done, wanted);
    };
    const py::gil_scoped_release release;
    return train_bpe(counter_.take(), options);
  }

 private:
  WordCounter counter_;
};

std::pair<std::vector<std::tuple<std::uint32_t, std::uint32_t, std::uint32_t>>, bool> rank_merges(
    const std::vector<std::optional<py::bytes>>& tokens) {
  std::vector<std::string_view> views;
  views.reserve(tokens.size());
  for (const auto& token : tokens) views.push_back(token ? bytes_view(*token) : std::string_view());
  RankMerges found;
  {
    const py::gil_scoped_release release;
    found = merges_of_ranks(views);
  }
  std::vector<std::tuple<std::uint32_t, std::uint32_t, std::uint32_t>> merges;
  merges.reserve(found.merges.size());
  for (const auto& [left, right, id] : found.merges) merges.emplace_back(left, right, id);
  return {std::move(merges), found.has_unreachable};
}

// The places behind each piece of text.
py::array_t<std::int64_t> piece_ends(const std::string& pattern, py::handle text) {
  const std::string_view view = text_view(text);
  const Pattern kind = parse_pattern(pattern);
  std::vector<std::int64_t> ends;
  {
    const py::gil_scoped_release release;
    const auto* const begin = reinterpret_cast<const std::uint8_t*>(view.data());
    for_each_piece(kind, begin, begin + view.size(),
                   [&](const std::uint8_t* piece, std::size_t length) {
                     ends.push_back(piece - begin + static_cast<std::ptrdiff_t>(length));
                   });
  }
  return py::array_t<std::int64_t>(static_cast<py::ssize_t>(ends.size()), ends.data());
}

py::list split(const std::string& pattern, py::handle text) {
  py::list out;
  const std::string_view view = text_view(text);
  const auto* const begin = reinterpret_cast<const std::uint8_t*>(view.data());
  for_each_piece(parse_pattern(pattern), begin, begin + view.size(),
                 [&](const std::uint8_t* piece, std::size_t length) {
                   out.append(py::bytes(reinterpret_cast<const char*>(piece), length));
                 });
  return out;
}

std::vector<std::uint32_t> byte_ids() { return {gpt2_byte_ids(), gpt2_byte_ids() + 256}; }

}  // namespace
}  // namespace fastgpt

PYBIND11_MODULE(_bpe, m) {
  using fastgpt::PyEncoder;
  using fastgpt::PyTrainer;
  // Not declared free of the GIL: encoders share their integers and their pools of work space under
  // it. A free-threaded Python turns the GIL on when it loads this module.
  m.doc() = "Byte-level BPE in C++; fastgpt.tokenizer is the interface to use.";
  m.attr("UNICODE_VERSION") = fastgpt::kUnicodeVersion;
  m.def("split", &fastgpt::split, py::arg("pattern"), py::arg("text"));
  m.def("piece_ends", &fastgpt::piece_ends, py::arg("pattern"), py::arg("text"));
  m.def("simd_levels", &fastgpt::simd_levels);
  m.def("simd_level", &fastgpt::simd_level);
  m.def("set_simd_level", &fastgpt::set_simd_level, py::arg("name"));
  m.def("byte_ids", &fastgpt::byte_ids);
  m.def("rank_merges", &fastgpt::rank_merges, py::arg("tokens"));
  py::class_<PyEncoder>(m, "Encoder")
      .def(py::init<const std::string&, std::vector<std::optional<py::bytes>>,
                    const std::vector<std::tuple<std::uint32_t, std::uint32_t, std::uint32_t>>&,
                    const std::vector<std::pair<py::bytes, std::uint32_t>>&, bool>(),
           py::arg("pattern"), py::arg("tokens"), py::arg("merges"), py::arg("specials"),
           py::arg("whole_pieces"))
      .def_property_readonly("encode",
                             [](const py::object& self) {
                               return fastgpt::bound_method<&PyEncoder::encode>(self, "encode");
                             })
      .def_property_readonly("encode_to_numpy",
                             [](const py::object& self) {
                               return fastgpt::bound_method<&PyEncoder::encode_to_numpy>(
                                   self, "encode_to_numpy");
                             })
      .def("encode_parallel", &PyEncoder::encode_parallel, py::arg("text"), py::arg("threads"))
      .def("encode_batch", &PyEncoder::encode_batch, py::arg("texts"), py::arg("threads"))
      .def("encode_spans", &PyEncoder::encode_spans, py::arg("text"), py::arg("ends"),
           py::arg("dropout"), py::arg("seed"))
      .def("decode", &PyEncoder::decode, py::arg("ids"))
      .def("decode_text", &PyEncoder::decode_text, py::arg("ids"), py::arg("errors"))
      .def_property_readonly("vocab_size", &PyEncoder::vocab_size);
  py::class_<PyTrainer>(m, "Trainer")
      .def(py::init<const std::string&, int>(), py::arg("pattern"), py::arg("threads"))
      .def("feed", &PyTrainer::feed, py::arg("texts"))
      .def("feed_spans", &PyTrainer::feed_spans, py::arg("text"), py::arg("ends"))
      .def("train", &PyTrainer::train, py::arg("merges"), py::arg("min_count"), py::arg("progress"),
           py::arg("max_length") = 0, py::arg("first") = std::vector<fastgpt::IdPair>());
}
