// Cuts a layer step into items, runs them on the pool, and adds the partial results in a fixed order.
#include "experts.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <stdexcept>
#include <string>
#include <vector>

#include "run.h"

namespace moestro {

int64_t block_bytes(const Shape& shape) {
  const int64_t bias = shape.has_bias ? shape.block * 4 : 0;
  const int64_t gate = shape.has_gate ? panels_bytes(shape.gate, shape.block, shape.hidden) + bias : 0;
  return gate + panels_bytes(shape.up, shape.block, shape.hidden) + bias + panels_bytes(shape.down, shape.hidden, shape.block);
}

namespace {

int64_t down_columns(const Shape& shape) { return shape.blocks() * shape.block; }

}  // namespace

int64_t head_bytes(const Shape& shape) {
  const int64_t gate = shape.has_gate ? table_bytes(shape.gate, shape.neurons, shape.hidden) : 0;
  const int64_t rest = table_bytes(shape.up, shape.neurons, shape.hidden) + table_bytes(shape.down, shape.hidden, down_columns(shape));
  return shape.orders * order_bytes(shape) + gate + rest;
}

Tables tables_of(const Shape& shape, const uint8_t* packed) {
  const uint8_t* at = packed + shape.orders * order_bytes(shape);
  const auto next = [&](const MatrixFormat& format, int64_t rows, int64_t columns) {
    if (!is_strided(format)) return ColumnTable{};
    const ColumnTable table{at, table_rows(format, rows), table_columns(columns)};
    at += table_bytes(format, rows, columns);
    return table;
  };
  Tables all;
  if (shape.has_gate) all.gate = next(shape.gate, shape.neurons, shape.hidden);
  all.up = next(shape.up, shape.neurons, shape.hidden);
  all.down = next(shape.down, shape.hidden, down_columns(shape));
  return all;
}

namespace {

constexpr int64_t kPoolElements = 1 << 16;  // of a norm or a lookup that is worth waking other threads

// Memory that is kept between calls and only grows, on cache lines.
class Buffer {
 public:
  float* take(int64_t floats) {
    if (floats > size_) {
      data_.reset(static_cast<float*>(::operator new(sizeof(float) * floats, std::align_val_t(64))));
      size_ = floats;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(float* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::unique_ptr<float, Free> data_;
  int64_t size_ = 0;
};

// How many tokens each of the nearly equal tiles of n tokens has, of `most` at most.
int64_t tile_of(int64_t n, int64_t most) {
  if (n <= kThinTokens) return kThinTokens;
  const int64_t tiles = (n + most - 1) / most;
  return (n + tiles - 1) / tiles;
}

// The most tokens of a tile: weights are read once for each, but all threads want something to do. No result depends
// on it, since no sum runs across tokens. `items_of` says how many items a choice would make.
template <class ItemsOf>
int64_t choose_tile(int threads, ItemsOf items_of) {
  int64_t chosen = 0;
  for (int64_t most : kTileTokens) {
    chosen = most;
    if (items_of(most) >= 4 * threads) break;
  }
  return chosen;
}

double now_s() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// An expert's order of columns by its number; none where it has none. Throws where it names a column that is not there.
const int32_t* order_of(const Work& work, const Shape& shape, int64_t number) {
  if (shape.orders == 0) return nullptr;
  const int32_t* order = reinterpret_cast<const int32_t*>(work.packed + number * order_bytes(shape));
  for (int64_t i = 0; i < shape.hidden; ++i) {
    if (order[i] < 0 || order[i] >= shape.hidden) throw std::out_of_range("packed: an order has no column " + std::to_string(order[i]));
  }
  return order;
}

// Of outputs [begin, begin + count) in the order of classes of rows, times a weight, to where they belong among D.
void add_rows(const MatrixFormat& f, int64_t D, float weight, const float* some, int64_t begin, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[own_row(f, D, begin + i)] += weight * some[i];
}

// What one token takes from one item: a partial row, of which work and of which of its rows. Segments differ in nothing else.
struct Part {
  const float* partial;
  const Work* work;
  int64_t row;

  bool goes_on(const Part& o) const { return work == o.work && row == o.row; }
};

}  // namespace

// The threads and their memory. Threads do not follow a fork, and a lock that one of them held stays held, so what was
// made before a fork is left as it lies.
struct Runner::Crew {
  Pool pool;
  std::mutex one_call;  // the memory is shared
  const int made_after = forks();
  Buffer partials;
  std::vector<Buffer> buffers;  // one a thread
  std::vector<Scratch> scratch;

  Crew(int threads, const std::vector<int>& cpus) : pool(threads, cpus), buffers(threads), scratch(threads) {}

  // The threads' scratch memory, none of which knows any tokens yet.
  Scratch* of_threads(int64_t floats) {
    for (size_t i = 0; i < buffers.size(); ++i) scratch[i] = Scratch{buffers[i].take(floats), {}};
    return scratch.data();
  }
};

// One call at a time, and timed.
class Runner::Call {
 public:
  explicit Call(Runner& runner) : crew(runner.crew()), runner_(runner), one_(crew.one_call), begin_s_(now_s()) {}
  ~Call() { runner_.busy_s_.store(runner_.busy_s_.load() + now_s() - begin_s_); }

  Crew& crew;

 private:
  Runner& runner_;
  std::lock_guard<std::mutex> one_;
  double begin_s_;
};

Runner::Runner(int threads, const std::vector<int>& cpus) : threads_(threads), cpus_(cpus), crew_(new Crew(threads, cpus)) {}

Runner::~Runner() {
  Crew* crew = crew_.load();
  if (crew->made_after == forks()) delete crew;
}

Runner::Crew& Runner::crew() {
  Crew* crew = crew_.load();
  if (crew->made_after == forks()) return *crew;
  Crew* fresh = new Crew(threads_, cpus_);
  if (crew_.compare_exchange_strong(crew, fresh)) return *fresh;
  delete fresh;  // another thread of the child was faster
  return *crew;
}

void Runner::run(const Level& level, const Shape& shape, const Input& x, int64_t tokens, const Work* works, int count,
                 float* out) {
  const Call call(*this);
  Crew& crew = call.crew;
  const int64_t D = shape.hidden, wide = round_up(D, kPanel), head = head_bytes(shape);

  const auto blocks_of = [&](const Work& work) { return (work.neuron_end - work.neuron_begin + shape.block - 1) / shape.block; };
  const auto tiles_of = [&](const Work& work, int64_t most) { return (work.tokens + most - 1) / most; };
  // An item is a whole expert where there are enough of them: then few partial results are written.
  const int64_t most = choose_tile(threads_, [&](int64_t tile) {
    int64_t segments = 0;
    for (int w = 0; w < count; ++w) {
      const int64_t blocks = segment_blocks(shape, works[w].tokens);
      segments += tiles_of(works[w], tile) * ((blocks_of(works[w]) + blocks - 1) / blocks);
    }
    return segments;
  });
  int64_t experts = 0;
  for (int w = 0; w < count; ++w) experts += tiles_of(works[w], most);
  const bool whole = experts >= 16 * threads_;

  std::vector<Item> items;
  std::vector<const Work*> owner;
  std::vector<int64_t> first_row, offset;
  int64_t floats = 0, widest = 0;
  for (int w = 0; w < count; ++w) {
    const Work& work = works[w];
    const int32_t *gate_order = order_of(work, shape, 0), *up_order = order_of(work, shape, shape.orders - 1);
    const Tables tables = tables_of(shape, work.packed);
    const int64_t begin = work.neuron_begin / shape.block, end = begin + blocks_of(work);
    const bool with_last = shape.has_bias && work.neuron_end == shape.neurons;
    const int64_t tile = tile_of(work.tokens, most), segment = segment_blocks(shape, work.tokens);
    for (int64_t t = 0; t < work.tokens; t += tile) {
      const int64_t n = std::min(tile, work.tokens - t);
      for (int64_t b = begin; b < end; b += whole ? end - begin : segment) {
        const int64_t stop = whole ? end : std::min(b + segment, end);
        items.push_back({work.packed + head, gate_order, up_order, tables, b, stop, segment, work.rows + t, n,
                         with_last && stop == end, nullptr, nullptr});
        owner.push_back(&work);
        first_row.push_back(t);
        offset.push_back(floats);
        floats += padded(n) * wide;
        widest = std::max(widest, n);
      }
    }
  }
  float* partials = crew.partials.take(floats);
  const size_t threads = static_cast<size_t>(threads_);
  for (size_t i = 0; i < items.size(); ++i) {
    items[i].partial = partials + offset[i];
    if (i + threads < items.size()) {
      const Item& next = items[i + threads];
      items[i].likely_next = next.packed + next.block_begin * block_bytes(shape);
    }
  }
  Scratch* scratch = crew.of_threads(scratch_floats(D, widest, shape.block));
  crew.pool.run(static_cast<int>(items.size()), [&](int i, int thread) { level.run_item(shape, x, items[i], scratch[thread]); });

  // Which parts each token takes, in the order of the items.
  std::vector<std::vector<Part>> parts(tokens);
  for (size_t i = 0; i < items.size(); ++i) {
    for (int64_t t = 0; t < items[i].tokens; ++t) {
      parts[items[i].rows[t]].push_back({items[i].partial + t * wide, owner[i], first_row[i] + t});
    }
  }
  // Few tokens: cut D, so that all threads have something to add.
  const int64_t cut = tokens >= 4 * threads_ ? D : std::max<int64_t>(256, D / (4 * threads_));
  const int64_t cuts = (D + cut - 1) / cut;
  crew.pool.run(static_cast<int>(tokens * cuts), [&](int i, int thread) {
    const int64_t t = i / cuts, begin = i % cuts * cut, width = std::min(cut, D - begin);
    float* sum = scratch[thread].memory;
    const std::vector<Part>& own = parts[t];
    for (size_t p = 0; p < own.size();) {
      const Part& first = own[p];
      const float* of_expert = first.partial + begin;
      for (++p; p < own.size() && own[p].goes_on(first); ++p) {  // the other segments
        if (of_expert != sum) std::copy_n(of_expert, width, sum);
        level.axpy(1, own[p].partial + begin, sum, width);
        of_expert = sum;
      }
      const float weight = first.work->weights[first.row];
      if (!is_strided(shape.down)) level.axpy(weight, of_expert, out + t * D + begin, width);
      else add_rows(shape.down, D, weight, of_expert, begin, width, out + t * D);
    }
  });
}

void Runner::run_linears(const Level& level, const Input& x, int64_t tokens, const Linear* linears, int count) {
  const Call call(*this);
  Crew& crew = call.crew;
  std::vector<int64_t> rows(tokens);
  for (int64_t t = 0; t < tokens; ++t) rows[t] = t;
  std::vector<LinearItem> items;
  const int64_t height = tokens <= kThinTokens ? kThinItemPanels : kItemPanels;
  const int64_t most = choose_tile(threads_, [&](int64_t tile) {
    int64_t strips = 0;
    for (int i = 0; i < count; ++i) strips += (linears[i].rows + height * kPanel - 1) / (height * kPanel);
    return (tokens + tile - 1) / tile * strips;
  });
  const int64_t tile = tile_of(tokens, most);
  for (int64_t t = 0; t < tokens; t += tile) {
    const int64_t n = std::min(tile, tokens - t);
    for (int i = 0; i < count; ++i) {
      const int64_t panels = (linears[i].rows + kPanel - 1) / kPanel;
      for (int64_t p = 0; p < panels; p += height) {
        items.push_back({&linears[i], p, std::min(p + height, panels), rows.data() + t, n});
      }
    }
  }
  Scratch* scratch = crew.of_threads(scratch_floats(x.width, std::min(tile, tokens), 0));
  crew.pool.run(static_cast<int>(items.size()), [&](int i, int thread) { level.run_linear(x, items[i], scratch[thread]); });
}

void Runner::look_up(const Level& level, const Linear& table, const int64_t* ids, int64_t n) {
  const int64_t K = table.columns, row_bytes = K * size_of(table.out_type);
  for (int64_t i = 0; i < n; ++i) {
    if (ids[i] < 0 || ids[i] >= table.rows)
      throw std::out_of_range("no row " + std::to_string(ids[i]) + " in a table of " + std::to_string(table.rows));
  }
  each(static_cast<int>(n), round_up(K, kGroup) + kPanel * kTileColumns, n * K >= kPoolElements, [&](int i, float* row) {
    level.unpack_row(table, ids[i], row + round_up(K, kGroup), row);
    level.write(row, K, table.out_type, static_cast<uint8_t*>(table.out) + i * row_bytes);
  });
}

void Runner::each(int count, int64_t floats, bool on_pool, const std::function<void(int, float*)>& do_one) {
  const Call call(*this);
  Crew& crew = call.crew;
  Scratch* scratch = crew.of_threads(floats);
  if (on_pool) return crew.pool.run(count, [&](int i, int thread) { do_one(i, scratch[thread].memory); });
  for (int i = 0; i < count; ++i) do_one(i, scratch[0].memory);
}

void Runner::rms_norm(const Level& level, const void* x, Type type, int64_t rows, const Norm& norm, void* out) {
  const float* weight = static_cast<const float*>(norm.weight);
  thread_local std::vector<float> converted;
  if (norm.type != Type::kFp32) {
    converted.resize(round_up(norm.width, kGroup));
    level.read({norm.weight, norm.type, norm.width}, converted.data());
    weight = converted.data();
  }
  each(static_cast<int>(rows), round_up(norm.width, kGroup), rows * norm.width >= kPoolElements, [&](int i, float* row) {
    level.rms_norm({x, type, norm.width}, i, weight, norm.offset, norm.epsilon, out, row);
  });
}

void Runner::touch(uint8_t* memory, int64_t bytes) {
  Crew& crew = this->crew();
  // Which thread will read what is not known beforehand, so pages are dealt out evenly, a huge page at a time.
  constexpr int64_t kHugePage = 2 << 20, kPage = 4096;
  crew.pool.run(static_cast<int>((bytes + kHugePage - 1) / kHugePage), [&](int i, int) {
    const int64_t end = std::min(bytes, (i + 1) * kHugePage);
    for (int64_t at = i * kHugePage; at < end; at += kPage) memory[at] = 0;
  });
}

double Runner::read_seconds(const Level& level, const float* memory, int64_t floats, int64_t prefetch) {
  const Call call(*this);
  Crew& crew = call.crew;
  constexpr int64_t kPiece = 4 << 20;  // 16 MiB: a thread reads long runs
  const int pieces = static_cast<int>((floats + kPiece - 1) / kPiece);
  std::atomic<int> finite{0};  // reads the sums, so that they are not taken out
  const double begin = now_s();
  crew.pool.run(pieces, [&](int i, int) {
    const float total = level.sum(memory + i * kPiece, std::min(kPiece, floats - i * kPiece), prefetch);
    if (total == total) finite.fetch_add(1, std::memory_order_relaxed);
  });
  return now_s() - begin;
}

double Runner::fma_flops(const Level& level, int64_t rounds) { return flops(level.fma, rounds); }
double Runner::dot_flops(const Level& level, int64_t rounds) { return flops(level.dots, rounds); }

double Runner::flops(double (*loop)(int64_t), int64_t rounds) {
  const Call call(*this);
  Crew& crew = call.crew;
  std::vector<double> operations(threads_);
  const double begin = now_s();
  crew.pool.run(threads_, [&](int i, int) { operations[i] = loop(rounds); });
  const double seconds = now_s() - begin;
  double total = 0;
  for (double o : operations) total += o;
  return total / seconds;
}

}  // namespace moestro
