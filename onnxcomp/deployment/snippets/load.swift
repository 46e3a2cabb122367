import Foundation
import OnnxRuntimeBindings

final class Model {
    private let environment: ORTEnv
    private let session: ORTSession

    init(path: String) throws {
        environment = try ORTEnv(loggingLevel: ORTLoggingLevel.warning)
        let options = try ORTSessionOptions()
        OPTIONS
        session = try ORTSession(env: environment, modelPath: path, sessionOptions: options)
    }

    func run(_ values: [Float]) throws -> [Float] {
        let data = NSMutableData(bytes: values, length: values.count * MemoryLayout<Float>.stride)
        let input = try ORTValue(
            tensorData: data, elementType: ORTTensorElementDataType.float, shape: [SHAPE])
        let outputs = try session.run(withInputs: ["INPUT": input], outputNames: ["OUTPUT"], runOptions: nil)
        let result = try outputs["OUTPUT"]!.tensorData() as Data
        return result.withUnsafeBytes { Array($0.bindMemory(to: Float.self)) }
    }
}

// With MODEL_FILE among the resources of the app:
// let model = try Model(path: Bundle.main.path(forResource: "MODEL_STEM", ofType: "MODEL_SUFFIX")!)
