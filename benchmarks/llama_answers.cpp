// What a GGUF file answers in the llama.cpp that this is compiled against, for quantised.py:
//
//     llama_answers MODEL ROWS THREADS RESULTS
//
// ROWS (int32) holds, row after row, the number of new tokens, the number of tokens, and these. Where new tokens are asked
// for, RESULTS (float32) gets the greedy ones; else the loss in nats of each token but the first. The cache is in float16,
// as by default. And, as llama-quantize does it, without an importance matrix:
//
//     llama_answers quantise MODEL OUTPUT FTYPE

#include "llama.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

static float loss_of(const float * logits, int width, int token) {
    const float largest = *std::max_element(logits, logits + width);
    double sum = 0;
    for (int other = 0; other < width; ++other) {
        sum += std::exp(double(logits[other]) - largest);
    }
    return float(std::log(sum) + largest - logits[token]);
}

static int quantise(const char * source, const char * target, int ftype) {
    llama_model_quantize_params params = llama_model_quantize_default_params();
    params.ftype = llama_ftype(ftype);
    params.nthread = 1;
    return llama_model_quantize(source, target, &params) == 0 ? 0 : 7;
}

int main(int argc, char ** argv) {
    if (argc != 5) {
        return 2;
    }
    ggml_backend_load_all();
    if (std::string(argv[1]) == "quantise") {
        return quantise(argv[2], argv[3], std::atoi(argv[4]));
    }
    std::ifstream file(argv[2], std::ios::binary);
    std::vector<char> bytes(std::istreambuf_iterator<char>(file), {});
    const auto * rows = reinterpret_cast<const int32_t *>(bytes.data());
    const size_t size = bytes.size() / sizeof(int32_t);
    int longest = 1;
    for (size_t place = 0; place < size; place += 2 + rows[place + 1]) {
        longest = std::max(longest, rows[place] + rows[place + 1]);
    }

    llama_model_params loading = llama_model_default_params();
    loading.use_extra_bufts = false;  // Without AMX: virtual machines may announce it and not run it.
    llama_model * model = llama_model_load_from_file(argv[1], loading);
    if (!model) {
        return 3;
    }
    const int width = llama_vocab_n_tokens(llama_model_get_vocab(model));
    llama_context_params params = llama_context_default_params();
    params.n_ctx = params.n_batch = longest;
    params.n_threads = params.n_threads_batch = std::atoi(argv[3]);
    llama_context * context = llama_init_from_model(model, params);
    if (!context) {
        return 4;
    }

    std::ofstream out(argv[4], std::ios::binary);
    llama_batch batch = llama_batch_init(longest, 0, 1);
    for (size_t place = 0; place < size; place += 2 + rows[place + 1]) {
        const int num_new = rows[place], length = rows[place + 1];
        std::vector<llama_token> tokens(rows + place + 2, rows + place + 2 + length);
        llama_memory_clear(llama_get_memory(context), true);
        for (int turn = 0, position = 0; turn < std::max(1, num_new); ++turn) {
            batch.n_tokens = tokens.size();
            for (int index = 0; index < batch.n_tokens; ++index) {
                batch.token[index] = tokens[index];
                batch.pos[index] = position++;
                batch.n_seq_id[index] = 1;
                batch.seq_id[index][0] = 0;
                batch.logits[index] = num_new == 0 || index == batch.n_tokens - 1;
            }
            if (llama_decode(context, batch) != 0) {
                return 5;
            }
            if (num_new == 0) {
                for (int index = 0; index + 1 < length; ++index) {
                    const float loss = loss_of(llama_get_logits_ith(context, index), width, tokens[index + 1]);
                    out.write(reinterpret_cast<const char *>(&loss), sizeof loss);
                }
                break;
            }
            const float * logits = llama_get_logits_ith(context, batch.n_tokens - 1);
            const llama_token made = std::max_element(logits, logits + width) - logits;
            const float written = made;
            out.write(reinterpret_cast<const char *>(&written), sizeof written);
            tokens.assign(1, made);
        }
    }
    return out.good() ? 0 : 6;
}
