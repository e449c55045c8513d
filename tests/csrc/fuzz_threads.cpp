// All that several threads do at once, compared with what one does; for builds with a sanitizer of
// threads. Usage: fuzz_threads SEED SECONDS. Prints the number of rounds; aborts on the first
// difference.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "batch_encoder.h"
#include "encoder.h"
#include "fuzzing.h"
#include "parallel.h"
#include "piece_finder.h"
#include "span_encoder.h"
#include "trainer.h"

using namespace fastgpt;

namespace {

using Ids = std::vector<std::uint32_t>;

constexpr int kThreads = 4;

std::string random_text(std::size_t length) {
  static const char* const kParts[] = {" the",     " of",          "ing", "\n", " ",  "7",  "!",
                                       "\xC3\xA9", "\xE4\xB8\xAD", " a",  "b",  "'s", "   "};
  std::string text;
  while (text.size() < length) text += kParts[below(std::size(kParts))];
  return text;
}

// Two counters, of one thread and of several, and so two trainings: the same merges.
std::vector<IdPair> train(const std::vector<std::string>& texts, Pattern pattern) {
  const std::vector<std::string_view> views(texts.begin(), texts.end());
  TrainOptions options;
  options.merges = 60;
  WordCounter one(pattern, 1);
  one.add(views);
  const auto pairs = train_bpe(one.take(), options);
  WordCounter several(pattern, kThreads);
  several.add(views);
  several.add(views);  // twice the counts, the same order
  require(train_bpe(several.take(), options) == pairs, "merges of several threads");
  return pairs;
}

Ids encode(const Encoder& encoder, std::string_view text) {
  TokenBuffer ids;
  encoder.encode(text, *encoder.acquire(), ids);
  return {ids.data(), ids.data() + ids.size()};
}

struct Utf8 {
  std::string_view text;
  std::string_view utf8(ByteBuffer&) const { return text; }
};

// Batches of texts, and the parts of one text, by several threads.
void check_batches(const Encoder& encoder, const std::vector<std::string>& texts) {
  std::vector<Encoder::State> states;
  for (int i = 0; i < kThreads; ++i) states.push_back(encoder.acquire());
  BatchEncoder batch(encoder, std::move(states), below(2) == 0);
  const auto check = [&](const std::vector<Utf8>& wanted) {
    batch.encode(wanted.data(), wanted.size());
    for (std::size_t i = 0; i < wanted.size(); ++i) {
      const auto& [array, begin, count] = batch.parts()[i];
      Ids found(count);
      for (std::size_t k = 0; k < count; ++k) {
        std::memcpy(&found[k], array->at(begin + k), array->id_bytes());
      }
      require(found == encode(encoder, wanted[i].text), "ids of a batch");
    }
  };
  std::vector<Utf8> whole;
  for (const std::string& text : texts) whole.push_back({text});
  check(whole);
  const std::string text = random_text(5 * Encoder::kPart);
  std::vector<Utf8> parts;
  for (const std::string_view part : Encoder::parts(text)) parts.push_back({part});
  require(parts.size() > 2, "a long text has parts");
  check(parts);
  Ids joined;
  for (const Utf8& part : parts) {
    const Ids ids = encode(encoder, part.text);
    joined.insert(joined.end(), ids.begin(), ids.end());
  }
  require(joined == encode(encoder, text), "ids of the parts");
}

// One encoder in threads that know nothing of each other, while the scanners change.
void check_sharing(const Encoder& encoder, const std::vector<std::string>& texts) {
  std::vector<Ids> wanted;
  for (const std::string& text : texts) wanted.push_back(encode(encoder, text));
  const SpanEncoder spans(encoder.vocabulary());
  const std::vector<std::string> levels = simd_levels();
  parallel_for(texts.size(), kThreads, [&](std::size_t i, int) {
    set_simd_level(levels[i % levels.size()]);
    require(encode(encoder, texts[i]) == wanted[i], "ids in a thread");
    IdArray array(i % 2 == 0);
    encoder.encode(texts[i], *encoder.acquire(), array);
    require(array.size() == wanted[i].size(), "as many ids in an array");
    std::free(array.release());
    ByteBuffer bytes;
    encoder.decode(wanted[i].data(), wanted[i].size(), bytes);
    require(std::string_view(bytes.data(), bytes.size()) == texts[i], "bytes in a thread");
    const auto size = static_cast<std::int64_t>(texts[i].size());
    Dropout none(0, i);
    TokenBuffer whole;
    spans.encode(texts[i], &size, 1, none, whole);
    bytes.clear();
    encoder.decode(whole.data(), whole.size(), bytes);
    require(std::string_view(bytes.data(), bytes.size()) == texts[i], "spans in a thread");
  });
}

// What one thread throws ends the loop of all, and comes out of it.
void check_errors() {
  std::atomic<int> calls{0};
  try {
    parallel_for(100'000, kThreads, [&](std::size_t i, int) {
      ++calls;
      if (i == 50) throw i;
    });
    require(false, "an error comes out of the loop");
  } catch (const std::size_t i) {
    require(i == 50 && calls > 50, "the error of a thread");
  }
}

void one_round() {
  const auto pattern = static_cast<Pattern>(below(4));
  std::vector<std::string> texts(8 + below(40));
  for (auto& text : texts) text = random_text(1 + below(3000));
  const Encoder encoder(trained_vocabulary(train(texts, pattern), pattern));
  check_batches(encoder, texts);
  check_sharing(encoder, texts);
  check_errors();
}

}  // namespace

int main(int argc, char** argv) { return fuzz(argc, argv, 12, one_round); }
