import * as ort from "onnxruntime-web";

export class Model {
  static async load(source = "MODEL_FILE") {
    const model = new Model();
    model.session = await ort.InferenceSession.create(source, { OPTIONS });
    return model;
  }

  async run(values) {
    const input = new ort.Tensor("float32", values, [SHAPE]);
    const outputs = await this.session.run({ "INPUT": input });
    return outputs["OUTPUT"].data;
  }
}

// const model = await Model.load();
