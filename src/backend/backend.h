// The small interface between the model and the device that computes it: an operation is here only
// because the model calls it. Implementations: src/backend/cpu (and src/backend/cuda).
//
// Activations are matrices [rows, cols] in memory that the backend owns, of a type that it chooses
// by what they hold; a row is one token of the ragged batch. Weights are prepared once and referred
// to by handle.
#pragma once

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "backend/attention_runner.h"
#include "backend/attention_variant.h"
#include "backend/batch.h"
#include "backend/kv_layout.h"
#include "backend/token_draw.h"
#include "base/dtype.h"
#include "base/tensor_view.h"

namespace sagelm {

// What a matrix holds. The residual stream and logits are float32 everywhere; activations are what
// the backend's products read: float32 on the CPU, the weights' 16-bit type on a GPU.
enum class Holds : uint8_t { kResidual, kActivations, kLogits };

// A dense row-major matrix in the backend's memory, valid until reserve is called or the backend is
// destroyed.
struct Matrix {
  void* data = nullptr;
  DType type = DType::kF32;
  int64_t rows = 0;
  int64_t cols = 0;
};

// Names a weight matrix that the backend has taken over and laid out for its products.
struct WeightHandle {
  int32_t index = -1;
};

// The bytes of a KV cache; which page belongs to which sequence is the model's business.
class KvStorage {
 public:
  virtual ~KvStorage() = default;
  // Copies what all layers hold in FP16 on page (kFp16) or tail (with its mean) `from` to `to`,
  // before the operations that follow.
  virtual void copy_open_page(int32_t from, int32_t to) = 0;
};

struct AttentionShape {
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  AttentionSpec spec;
};

// What scoring keeps of one row of logits.
struct TokenScore {
  float logprob = 0;   // natural log-probability of the target
  int32_t argmax = 0;  // the most probable token (the lowest id among equals)
};

// What the device does at best, per second: what speeds are compared with. 0: it has no such units,
// or none that are measured.
struct Ceilings {
  double copy_bytes = 0;  // read and written by a large copy
  double half_ops = 0;    // operations (two per multiply-add) of a large product of the kind that
                          // the model's linear layers are
  double int8_ops = 0;    // of a large INT8 product
  double fp8_ops = 0;     // of a large FP8 product
};

// The largest that a slot of scratch gets.
struct ScratchSize {
  int64_t rows = 0;
  int64_t cols = 0;
  Holds holds = Holds::kActivations;
};

// The most that steps take.
struct StepLimits {
  std::vector<ScratchSize> scratch;       // by slot
  std::vector<AttentionShape> attention;  // of the layers; a kind of layer need be there once
  int64_t tokens = 0;                     // rows of a step
  int64_t sequences = 0;                  // of a step
  int64_t context = 0;                    // tokens of a sequence
};

// Of a device that has its own; all 0 for one that computes in the host's.
struct DeviceMemory {
  int64_t total = 0;
  int64_t free = 0;       // now, whoever holds the rest
  int64_t held_most = 0;  // by all backends of this process at once, since this one was made
};

struct RowsCopy {
  Matrix from, to;
};

// What lies between the attention of a layer and that of the next: x += attended O^T, then
// x += MLP(norm(x)), then next_out = norm(x) N^T.
struct LayerTail {
  Matrix attended;
  Matrix x;  // the residual
  WeightHandle o, norm, gate_up, down;
  WeightHandle next_norm, next;  // none: there is no next layer
  Matrix next_out;
  double eps = 0;
  // Room for what is in between, which is not defined afterwards: [rows of x, ...].
  Matrix normed, gate_up_out, activated;
};

class Backend {
 public:
  virtual ~Backend() = default;

  virtual std::string device_name() const = 0;
  virtual DeviceMemory device_memory() const { return {}; }
  // Bytes held now.
  virtual int64_t weight_bytes() const = 0;
  virtual int64_t activation_bytes() const = 0;

  // Whether it refuses weights that hold NaN or infinity, naming tensor and element; if not,
  // somebody else has to look.
  virtual bool checks_weights() const { return false; }

  // What is said of memory before it is taken.
  // How it would hold a matrix of products, or an embedding, that is stored as `stored`.
  virtual DType product_type(DType stored) const { return stored; }
  virtual DType embedding_type(DType stored) const { return stored; }
  // Whether a matrix of products that is the embedding too takes no memory of its own.
  virtual bool shares_embedding() const { return false; }
  virtual int64_t kv_bytes(const KvLayout& layout) const = 0;
  virtual int64_t step_bytes(const StepLimits& limits) const = 0;
  // Tokens of a step that long prompts are run in, where nothing else is asked for.
  virtual int64_t default_step_tokens() const { return 2048; }

  // Memory.
  virtual WeightHandle add_linear(std::span<const TensorView> stacked) = 0;  // rows concatenated
  // What linear_swiglu takes: [gate; up].
  virtual WeightHandle add_gate_up(const TensorView& gate, const TensorView& up) {
    return add_linear(std::vector{gate, up});
  }
  virtual WeightHandle add_vector(const TensorView& tensor) = 0;  // a norm's weight
  virtual WeightHandle add_embedding(const TensorView& tensor) = 0;
  virtual std::unique_ptr<KvStorage> make_kv(const KvLayout& layout) = 0;
  // Makes room for steps within limits, which come after the weights. What scratch gave before is
  // no longer valid.
  virtual void reserve(const StepLimits& limits) = 0;
  // A slot always holds the same. Throws Error beyond what was reserved.
  virtual Matrix scratch(int slot, int64_t rows, int64_t cols, Holds holds) = 0;
  // Throws UsageError for a variant, Error for a shape, that attention() could not compute.
  virtual void check_attention(const AttentionShape& shape) const = 0;
  // What sage-adaptive picks from, fastest first, the last one being FP16 (docs/architecture.md).
  virtual std::vector<AttentionVariant> adaptive_variants() const = 0;
  // Whether attention() can read such a cache.
  virtual bool reads_kv(const AttentionShape& shape, KvType type) const = 0;

  // Starts a step over batch, which must outlive it: operations that take a batch take this one.
  // The draws (kMostDraws at most) are those of draw(); what they refer to must outlive the step
  // too. Batch and draws may hold names of tokens.
  virtual void begin(const Batch& batch, std::span<const TokenDraw> draws = {}) = 0;

  // Does `work`, which calls operations of this step on kv and reads nothing back. What it does may
  // depend only on the number of sequences and rows, on kv and on the layers' attention: an
  // implementation may keep what was enqueued and repeat that for a later step alike instead of
  // calling work.
  virtual void repeat(const KvStorage& /*kv*/, std::span<const AttentionSpec> /*layers*/,
                      const std::function<void()>& work) {
    work();
  }

  // Seconds that the device spent in work that it repeated, since the last call; waits for it.
  virtual double repeated_seconds() { return 0; }

  // Errors of the operations that follow name this layer; none if it is -1.
  virtual void enter_layer(int64_t /*layer*/) {}

  // Operations. x and out never overlap unless said.
  virtual void embed(WeightHandle table, const Batch& batch, Matrix out) = 0;
  virtual void rmsnorm(Matrix x, WeightHandle weight, double eps, Matrix out) = 0;
  virtual void linear(Matrix x, WeightHandle weight, Matrix out) = 0;      // out = x W^T
  virtual void linear_add(Matrix x, WeightHandle weight, Matrix out) = 0;  // out += x W^T
  // out = silu(x G^T) * (x U^T), where weight is [G; U] of add_gate_up. gate_up has room for x
  // weight^T; what it holds afterwards is not defined.
  virtual void linear_swiglu(Matrix x, WeightHandle weight, Matrix gate_up, Matrix out) = 0;
  // A norm and the product of what it gives, for which `normed` has room; what that holds
  // afterwards is not defined. An implementation may do both at once.
  virtual void norm_linear(Matrix x, WeightHandle norm, double eps, WeightHandle weight,
                           Matrix normed, Matrix out) {
    rmsnorm(x, norm, eps, normed);
    linear(normed, weight, out);
  }
  virtual void norm_linear_swiglu(Matrix x, WeightHandle norm, double eps, WeightHandle weight,
                                  Matrix normed, Matrix gate_up, Matrix out) {
    rmsnorm(x, norm, eps, normed);
    linear_swiglu(normed, weight, gate_up, out);
  }
  // An implementation may do all of it at once.
  virtual void layer_tail(const LayerTail& t) {
    linear_add(t.attended, t.o, t.x);
    norm_linear_swiglu(t.x, t.norm, t.eps, t.gate_up, t.normed, t.gate_up_out, t.activated);
    linear_add(t.activated, t.down, t.x);
    if (t.next.index >= 0) norm_linear(t.x, t.next_norm, t.eps, t.next, t.normed, t.next_out);
  }
  // to[i, :] = from[rows[i], :] for each of copies. `to` is of the type of `from`.
  virtual void gather_rows(std::span<const int32_t> rows,
                           std::initializer_list<RowsCopy> copies) = 0;

  // Rotates the query and key columns of qkv [rows, q + k + v] in place by each row's position and
  // appends keys and values, rounded to FP16, to the pages of the row's sequence. In a quantized
  // cache the pages that become full are quantized, and the tail then holds the tokens past them.
  virtual void rope_append(Matrix qkv, const Batch& batch, const AttentionShape& shape,
                           std::span<const float> inverse_frequencies, int64_t layer,
                           KvStorage& kv) = 0;
  // The query columns of qkv attend to the cached keys of their own sequence, causally with the
  // last query row seeing the last key. out [rows, num_heads * head_dim].
  virtual void attention(Matrix qkv, const Batch& batch, const AttentionShape& shape, int64_t layer,
                         KvStorage& kv, Matrix out) = 0;
  // Both, one after the other; what qkv holds afterwards is not defined. An implementation may do
  // them at once.
  virtual void append_and_attend(Matrix qkv, const Batch& batch, const AttentionShape& shape,
                                 std::span<const float> inverse_frequencies, int64_t layer,
                                 KvStorage& kv, Matrix out) {
    rope_append(qkv, batch, shape, inverse_frequencies, layer, kv);
    attention(qkv, batch, shape, layer, kv, out);
  }

  // Copies rows of logits (or of any matrix) to the host; throws Error naming the row if one is NaN
  // or infinite.
  virtual void read_logits(Matrix logits, std::span<float> out) = 0;
  // Log-softmax at targets[i] of row i, in double precision; the same check.
  virtual void score(Matrix logits, std::span<const int32_t> targets,
                     std::span<TokenScore> out) = 0;
  // Draws the tokens of begin()'s draws by logits.
  virtual void draw(Matrix logits) = 0;
  // Once all of such a step is enqueued: the name of its first draw's token.
  virtual int32_t drawn_name() = 0;
  // The tokens of the step whose first name this is, as long as names of it are good; -1 where the
  // logits were not finite. Waits for that step alone.
  virtual void read_drawn(int32_t name, std::span<int32_t> tokens) = 0;
  // Whether it computes while the caller goes on: then it pays to enqueue a step before the tokens
  // of the one in front of it are read.
  virtual bool runs_ahead() const { return false; }
  // True if every value is finite.
  virtual bool all_finite(Matrix x) = 0;

  // Measurements, which no model calls.
  // Medians of several runs; takes a second or so.
  virtual Ceilings measure_ceilings() = 0;
  // The tensors must outlive it; so must the backend.
  virtual std::unique_ptr<AttentionRunner> make_attention_runner(const AttentionCall& call,
                                                                 std::span<const uint16_t> q,
                                                                 std::span<const uint16_t> k,
                                                                 std::span<const uint16_t> v) = 0;
};

}  // namespace sagelm
