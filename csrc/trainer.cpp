#include "trainer.h"

#include <algorithm>
#include <queue>
#include <stdexcept>
#include <utility>

#include "pair_table.h"

namespace fastgpt {
namespace {

constexpr std::uint32_t kSeparator = 0xFFFFFFFF;  // between two words
constexpr std::uint32_t kInside = 0xFFFFFFFE;     // a place where no token starts or ends any more

// A pair that is the candidate for the next merge while its count is still what it says.
struct Candidate {
  std::uint64_t count;
  std::uint64_t key;
  bool operator<(const Candidate& other) const {
    return count != other.count ? count < other.count : key > other.key;
  }
};

// All distinct words, one behind the other with separators, a place per byte. A token writes its
// id to the first and to the last of its places, so both neighbours are found without links.
class Text {
 public:
  explicit Text(const WordMap& words);

  std::size_t size() const { return ids_.size(); }
  std::uint32_t operator[](std::size_t place) const { return ids_[place]; }
  std::uint32_t length(std::uint32_t id) const { return lengths_[id]; }
  std::uint32_t add_id(std::uint32_t length) {
    lengths_.push_back(length);
    return static_cast<std::uint32_t>(lengths_.size()) - 1;
  }
  std::uint32_t ids() const { return static_cast<std::uint32_t>(lengths_.size()); }

  // How often the word at this place was seen.
  std::uint64_t count(std::uint32_t place) const {
    std::uint32_t run = run_of_block_[place / kBlock];
    while (runs_[run + 1].begin <= place) ++run;
    return runs_[run].count;
  }

  // Makes one token of the two that start at `place` and at `middle` and end before `end`.
  void merge(std::uint32_t place, std::uint32_t middle, std::uint32_t end, std::uint32_t id) {
    ids_[middle] = kInside;
    ids_[place] = id;
    ids_[end - 1] = id;
  }

  // Calls f(left id, right id, place of the left one) for all neighbours.
  template <class F>
  void for_each_pair(F&& f) const {
    for (std::size_t at = 0; at < ids_.size();) {
      if (ids_[at] == kSeparator) {
        ++at;
        continue;
      }
      const std::size_t next = at + lengths_[ids_[at]];
      if (ids_[next] != kSeparator) f(ids_[at], ids_[next], static_cast<std::uint32_t>(at));
      at = next;
    }
  }

 private:
  static constexpr std::uint32_t kBlock = 64;

  // Words lie in the order of their counts, so a count holds for a whole run of places.
  struct Run {
    std::uint32_t begin;
    std::uint64_t count;
  };

  std::vector<std::uint32_t> ids_;
  std::vector<std::uint32_t> lengths_;  // by id, in bytes
  std::vector<Run> runs_;
  std::vector<std::uint32_t> run_of_block_;  // the run at the first place of each block
};

Text::Text(const WordMap& words) : lengths_(256, 1) {
  struct Word {
    const std::uint8_t* bytes;
    std::size_t length;
    std::uint64_t count;
  };
  std::vector<Word> sorted;
  sorted.reserve(words.size());
  std::size_t places = 1;
  words.for_each([&](const std::uint8_t* bytes, std::size_t length, std::uint64_t count) {
    if (length < 2) return;  // nothing to merge
    sorted.push_back({bytes, length, count});
    places += length + 1;
  });
  if (places >= kInside) {
    throw std::invalid_argument("the distinct words of the text have more than 4 GiB together");
  }
  std::sort(sorted.begin(), sorted.end(),
            [](const Word& a, const Word& b) { return a.count > b.count; });
  ids_.reserve(places);
  ids_.push_back(kSeparator);
  const std::uint32_t* const byte_ids = gpt2_byte_ids();
  for (const Word& word : sorted) {
    if (runs_.empty() || runs_.back().count != word.count) {
      runs_.push_back({static_cast<std::uint32_t>(ids_.size()), word.count});
    }
    for (std::size_t i = 0; i < word.length; ++i) ids_.push_back(byte_ids[word.bytes[i]]);
    ids_.push_back(kSeparator);
  }
  runs_.resize(std::max<std::size_t>(runs_.size(), 1), Run{1, 0});
  runs_.push_back({kSeparator, 0});
  std::uint32_t run = 0;
  for (std::size_t begin = 0; begin < ids_.size(); begin += kBlock) {
    while (runs_[run + 1].begin <= begin) ++run;
    run_of_block_.push_back(run);
  }
}

class Trainer {
 public:
  Trainer(WordMap words, const TrainOptions& options)
      : options_(options),
        min_count_(std::max<std::uint64_t>(options.min_count, 1)),
        max_length_(options.max_length ? options.max_length : kInside),
        text_(words),
        left_(256),
        right_(256) {}

  std::vector<IdPair> run();

 private:
  // The change that one merge makes to the pairs with one neighbouring id.
  struct Neighbour {
    std::uint64_t lost = 0;    // of the pair with the half that was next to it
    std::uint64_t gained = 0;  // of the pair with the new token
    std::uint32_t events = 0;
    std::uint32_t* places = nullptr;
  };
  struct Event {
    std::uint32_t neighbour;
    std::uint32_t place;
  };
  // All neighbours on one side.
  struct Side {
    explicit Side(std::size_t ids) : of(ids) {}
    std::vector<Neighbour> of;  // by id; all clear between merges
    std::vector<std::uint32_t> touched;
    std::vector<Event> events;

    Neighbour& add(std::uint32_t id, std::uint32_t place, std::uint64_t count) {
      Neighbour& neighbour = of[id];
      if (neighbour.events++ == 0) touched.push_back(id);
      neighbour.gained += count;
      events.push_back({id, place});
      return neighbour;
    }
  };

  void merge_first(std::vector<IdPair>* merges);
  void index_pairs();
  void index_pairs_from(std::uint64_t horizon);
  bool fits(std::uint32_t left, std::uint32_t right) const {
    return std::size_t{text_.length(left)} + text_.length(right) <= max_length_;
  }
  bool next_pair(std::uint64_t* key);
  std::uint32_t add_id(std::uint32_t left, std::uint32_t right);
  void merge(std::uint32_t left, std::uint32_t right);
  void replace(PairInfo& pair, std::uint32_t left, std::uint32_t right, std::uint32_t id);
  template <class OldKey, class NewKey>
  void settle(Side& side, std::uint64_t merged, OldKey&& old_key, NewKey&& new_key);

  const TrainOptions& options_;
  const std::uint64_t min_count_;
  std::size_t max_length_;
  Text text_;
  PairTable pairs_;
  std::priority_queue<Candidate> queue_;
  // Only pairs at least this frequent are in pairs_. Most pairs never become frequent enough to be
  // merged; leaving them out saves their memory. When the queue runs dry the bound is lowered and
  // the text is indexed again.
  std::uint64_t horizon_ = 0;
  Side left_;
  Side right_;
};

void Trainer::index_pairs() {
  constexpr std::uint64_t kNextShare = 16;
  index_pairs_from(std::max(horizon_ / kNextShare, min_count_));
}

// A horizon of 0 is chosen here.
void Trainer::index_pairs_from(std::uint64_t horizon) {
  constexpr std::uint64_t kFirstShare = 1024;
  pairs_.clear();
  PairTable all;
  std::uint64_t top = 0;
  text_.for_each_pair([&](std::uint32_t left, std::uint32_t right, std::uint32_t place) {
    if (!fits(left, right)) return;
    const std::uint64_t key = pair_key(left, right);
    PairInfo* info = all.find(key);
    if (!info) info = &all.insert(key, 0);
    info->count += text_.count(place);
    ++info->places_size;
    top = std::max(top, info->count);
  });
  horizon_ = horizon ? horizon : std::max(top / kFirstShare, min_count_);
  std::vector<Candidate> candidates;
  for (PairInfo& info : all.infos()) {
    if (info.count < horizon_) continue;
    pairs_.insert(info.key, info.count).places.reset(new std::uint32_t[info.places_size]);
    candidates.push_back({info.count, info.key});
  }
  all.clear();
  queue_ = std::priority_queue<Candidate>(std::less<Candidate>(), std::move(candidates));
  text_.for_each_pair([&](std::uint32_t left, std::uint32_t right, std::uint32_t place) {
    PairInfo* info = pairs_.find(pair_key(left, right));
    if (info) info->places[info->places_size++] = place;
  });
}

// Counts only fall after a pair was queued, so one whose count is out of date goes back with the
// count it has now, and the first that is up to date is the most frequent of all.
bool Trainer::next_pair(std::uint64_t* key) {
  while (true) {
    while (!queue_.empty()) {
      const Candidate top = queue_.top();
      queue_.pop();
      const std::uint64_t count = pairs_.find(top.key)->count;
      if (count == top.count) {
        *key = top.key;
        return true;
      }
      if (count >= horizon_) queue_.push({count, top.key});
    }
    if (horizon_ == min_count_) return false;
    index_pairs();
  }
}

std::uint32_t Trainer::add_id(std::uint32_t left, std::uint32_t right) {
  left_.of.emplace_back();
  right_.of.emplace_back();
  return text_.add_id(text_.length(left) + text_.length(right));
}

void Trainer::merge(std::uint32_t left, std::uint32_t right) {
  const std::uint32_t id = add_id(left, right);
  const std::uint64_t merged = pair_key(left, right);
  PairInfo& pair = *pairs_.find(merged);
  replace(pair, left, right, id);
  pair.count = 0;
  pair.places.reset();
  settle(
      left_, merged, [&](std::uint32_t x) { return pair_key(x, left); },
      [&](std::uint32_t x) { return pair_key(x, id); });
  settle(
      right_, merged, [&](std::uint32_t y) { return pair_key(right, y); },
      [&](std::uint32_t y) { return pair_key(id, y); });
}

void Trainer::replace(PairInfo& pair, std::uint32_t left, std::uint32_t right, std::uint32_t id) {
  for (std::uint32_t i = 0; i < pair.places_size; ++i) {
    const std::uint32_t place = pair.places[i];
    if (text_[place] != left) continue;
    const std::uint32_t middle = place + text_.length(left);
    if (text_[middle] != right) continue;
    const std::uint32_t end = middle + text_.length(right);
    const std::uint64_t count = text_.count(place);
    const std::uint32_t x = text_[place - 1];
    const std::uint32_t y = text_[end];
    text_.merge(place, middle, end, id);
    if (x != kSeparator) {
      Neighbour& neighbour = left_.add(x, place - text_.length(x), count);
      if (x == id) {
        right_.of[left].gained -= count;  // what follows the merge before is not `left` any more
      } else {
        neighbour.lost += count;
      }
    }
    if (y != kSeparator) right_.add(y, place, count).lost += count;
  }
}

// Takes the pairs that one merge made and unmade on one side into the table.
template <class OldKey, class NewKey>
void Trainer::settle(Side& side, std::uint64_t merged, OldKey&& old_key, NewKey&& new_key) {
  for (const std::uint32_t id : side.touched) {
    Neighbour& neighbour = side.of[id];
    if (neighbour.lost && old_key(id) != merged) {
      if (PairInfo* old = pairs_.find(old_key(id))) {
        old->count -= neighbour.lost;
        if (old->count == 0) old->places.reset();
      }
    }
    const std::uint64_t key = new_key(id);
    if (neighbour.gained >= horizon_ &&
        fits(static_cast<std::uint32_t>(key >> 32), static_cast<std::uint32_t>(key))) {
      PairInfo& made = pairs_.insert(key, neighbour.gained);
      made.places.reset(new std::uint32_t[neighbour.events]);
      made.places_size = neighbour.events;
      neighbour.places = made.places.get();
      queue_.push({neighbour.gained, made.key});
    }
  }
  for (const Event& event : side.events) {
    Neighbour& neighbour = side.of[event.neighbour];
    if (neighbour.places) *neighbour.places++ = event.place;
  }
  for (const std::uint32_t id : side.touched) side.of[id] = Neighbour{};
  side.touched.clear();
  side.events.clear();
}

void Trainer::merge_first(std::vector<IdPair>* merges) {
  const std::size_t max_length = std::exchange(max_length_, std::size_t{kInside});
  index_pairs_from(1);
  for (const auto& [left, right] : options_.first) {
    if (merges->size() == options_.merges) break;
    if (std::max(left, right) >= text_.ids()) {
      throw std::invalid_argument("a first merge of ids that do not exist yet");
    }
    const PairInfo* const pair = pairs_.find(pair_key(left, right));
    if (pair && pair->places) {  // it has none once all of them were merged elsewhere
      merge(left, right);
    } else {
      add_id(left, right);
    }
    merges->emplace_back(left, right);
  }
  max_length_ = max_length;
}

std::vector<IdPair> Trainer::run() {
  constexpr std::size_t kProgressEvery = 256;
  std::vector<IdPair> merges;
  if (!options_.first.empty()) merge_first(&merges);
  index_pairs_from(0);
  std::uint64_t key;
  while (merges.size() < options_.merges && next_pair(&key)) {
    const auto left = static_cast<std::uint32_t>(key >> 32);
    const auto right = static_cast<std::uint32_t>(key);
    merge(left, right);
    merges.emplace_back(left, right);
    if (options_.progress && merges.size() % kProgressEvery == 0) {
      options_.progress(merges.size(), options_.merges);
    }
  }
  if (options_.progress) options_.progress(merges.size(), options_.merges);
  return merges;
}

struct ByteIds {
  std::uint32_t of[256];
  ByteIds() {
    const auto printable = [](int byte) {
      return (byte > 32 && byte < 127) || (byte > 160 && byte != 173);
    };
    std::uint32_t id = 0;
    for (int byte = 0; byte < 256; ++byte) {
      if (printable(byte)) of[byte] = id++;
    }
    for (int byte = 0; byte < 256; ++byte) {
      if (!printable(byte)) of[byte] = id++;
    }
  }
};

}  // namespace

const std::uint32_t* gpt2_byte_ids() {
  static const ByteIds ids;
  return ids.of;
}

std::vector<IdPair> train_bpe(WordMap words, const TrainOptions& options) {
  Trainer trainer(std::exchange(words, WordMap()), options);  // the words are gone before it runs
  return trainer.run();
}

}  // namespace fastgpt
