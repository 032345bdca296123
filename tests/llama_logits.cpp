// Logits of a GGUF file in the llama.cpp that this is compiled against, for test_serving.py:
//
//     llama_logits MODEL TOKENS NUM_NEW CACHE LOGITS
//
// Reads TOKENS (int32) at once, then goes on greedily for NUM_NEW tokens, one at a time from the cache, which is kept in
// CACHE (f16, the engine's default, or f32). Writes the logits (float32) after each token.

#include "llama.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

int main(int argc, char ** argv) {
    if (argc != 6) {
        return 2;
    }
    std::ifstream file(argv[2], std::ios::binary);
    std::vector<char> bytes(std::istreambuf_iterator<char>(file), {});
    const auto * first = reinterpret_cast<const int32_t *>(bytes.data());
    std::vector<llama_token> tokens(first, first + bytes.size() / sizeof(int32_t));
    const int num_new = std::atoi(argv[3]);

    ggml_backend_load_all();
    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) {
        return 3;
    }
    const size_t width = llama_vocab_n_tokens(llama_model_get_vocab(model));

    llama_context_params params = llama_context_default_params();
    params.n_ctx = params.n_batch = tokens.size() + num_new;
    params.n_threads = params.n_threads_batch = 1;  // Threads that wait for each other spin: slow on a busy machine.
    if (std::string(argv[4]) == "f32") {
        params.type_k = params.type_v = GGML_TYPE_F32;
    }
    llama_context * context = llama_init_from_model(model, params);
    if (!context) {
        return 4;
    }

    std::ofstream out(argv[5], std::ios::binary);
    llama_batch batch = llama_batch_init(tokens.size(), 0, 1);
    int position = 0;
    for (int turn = 0; turn <= num_new; ++turn) {
        batch.n_tokens = tokens.size();
        for (size_t place = 0; place < tokens.size(); ++place) {
            batch.token[place] = tokens[place];
            batch.pos[place] = position++;
            batch.n_seq_id[place] = 1;
            batch.seq_id[place][0] = 0;
            batch.logits[place] = true;
        }
        if (llama_decode(context, batch) != 0) {
            return 5;
        }
        const float * logits = nullptr;
        for (size_t place = 0; place < tokens.size(); ++place) {
            logits = llama_get_logits_ith(context, place);
            out.write(reinterpret_cast<const char *>(logits), width * sizeof(float));
        }
        tokens.assign(1, std::max_element(logits, logits + width) - logits);
    }
    return out.good() ? 0 : 6;
}
