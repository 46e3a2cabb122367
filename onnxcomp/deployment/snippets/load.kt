import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtSession
import java.nio.FloatBuffer

class Model(bytes: ByteArray) : AutoCloseable {
    private val environment = OrtEnvironment.getEnvironment()
    private val session = environment.createSession(bytes, OrtSession.SessionOptions().apply { OPTIONS })

    fun run(values: FloatArray): FloatArray =
        OnnxTensor.createTensor(environment, FloatBuffer.wrap(values), longArrayOf(SHAPE)).use { input ->
            session.run(mapOf("INPUT" to input)).use { result ->
                val buffer = (result.get("OUTPUT").get() as OnnxTensor).floatBuffer
                FloatArray(buffer.remaining()).also { buffer.get(it) }
            }
        }

    override fun close() = session.close()
}

// In an Activity, with MODEL_FILE in src/main/assets:
// val model = Model(assets.open("MODEL_FILE").readBytes())
